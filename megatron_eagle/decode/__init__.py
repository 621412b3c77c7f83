"""Greedy decoding in the framework: a base alone, and a base with a draft that speculates."""
