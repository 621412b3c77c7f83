"""Attention without mask tensors, shared by base, draft and decoding.

* ``core``: the core attention module of every layer, and the states it can attend by.
* ``trunk_branch``: attention of the TTT steps. ``blocks``: what it and the rest are made of, causal
  blocks merged by their log-sum-exp. ``flash``: the kernels.
* ``packing``: documents packed into one sequence.
* ``rope``, ``mla``: rotary embeddings and multi-latent attention beyond Megatron's flags.
"""
