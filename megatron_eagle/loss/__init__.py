"""The fused, vocab-parallel loss of all steps."""
