"""The commands behind ``megatron-eagle``."""
