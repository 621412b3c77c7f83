"""Greedy decoding in any layout: the base alone, and speculatively with base and draft."""
