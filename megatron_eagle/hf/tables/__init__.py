"""Declarative tables that map Hugging Face names and fields to Megatron."""
