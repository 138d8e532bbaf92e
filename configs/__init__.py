"""Runs as YAML files, shipped with the package so that `moesaic train quickstart` works anywhere."""
