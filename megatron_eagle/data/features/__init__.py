"""Offline features: the base's hidden states on disk, to train a draft without running the base."""
