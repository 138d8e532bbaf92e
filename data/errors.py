"""The error of everything a user can get wrong with a corpus, its tokenizer or its cache."""


class DataError(ValueError):
    """Says what is wrong, with the file or the config key, and what to do about it."""
