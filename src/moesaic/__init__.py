"""moesaic: train sparse transformers, exactly, from a laptop to a cluster."""

__version__ = "0.1.0"
