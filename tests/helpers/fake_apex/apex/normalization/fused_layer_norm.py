"""Apex's fused layer norm, without its kernel: Megatron looks whether the name can be imported."""


class FusedLayerNormAffineFunction:
    """Stands for Apex's autograd function."""
