"""Inside Megatron's trainer: flags, model, step, data. Alone imports ``megatron.training``."""
