"""Checkpoints that Megatron-LM or Megatron-Bridge saved: what they say of the model in them."""
