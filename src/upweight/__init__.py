"""upweight: the whole training recipe of a small reasoning language model, from raw documents to a measured model."""

__version__ = "0.1.0"
