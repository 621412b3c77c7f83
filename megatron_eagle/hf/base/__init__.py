"""Hugging Face bases: config.json and weights to Megatron."""
