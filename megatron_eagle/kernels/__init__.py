"""Triton kernels for a GPU, each in the place of an eager function that stays the reference.

* ``choice``: whether a call runs the kernel or the eager function.
* ``softmax``, ``acceptance``, ``reverse_kl``: the passes over a chunk of logits (loss, teacher).
* ``branch``: attention to branch keys.

Triton is optional: the kernel modules import it, nothing imports them but ``choice``, and that when
a kernel is called.
"""
