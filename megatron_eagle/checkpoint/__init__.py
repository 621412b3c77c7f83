"""Megatron checkpoints on disk: finding, reading and writing them."""
