"""Vocab-parallel primitives: shards, statistics, the fused loss. No Megatron global state."""
