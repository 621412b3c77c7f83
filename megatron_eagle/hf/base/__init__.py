"""Import of Hugging Face bases: config.json and weights to a Megatron checkpoint."""
