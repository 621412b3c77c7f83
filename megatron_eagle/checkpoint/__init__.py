"""Megatron checkpoints on disk: where they lie, how they are read and written."""
