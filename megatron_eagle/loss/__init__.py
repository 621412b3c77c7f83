"""Losses of all TTT steps on vocabulary shards, fused with the draft's head.

Start at ``soft_cross_entropy.py``; the losses by name are in ``registry.py``.
"""
