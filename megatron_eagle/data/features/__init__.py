"""A base's hidden states on disk, to train a draft without the base's layers."""
