"""Norms whose weight is stored as its difference from 1, without Transformer Engine.

Megatron trains them with apply_layernorm_1p; its local modules have no such norm.

Shape letters: H hidden channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.compat import IdentityOp


class ZeroCenteredNorm(torch.nn.Module):
    """LayerNorm or RMSNorm [..., H] -> [..., H] that multiplies by 1 + weight; fp32 statistics.

    The constructor's arguments are Megatron's; ``config.normalization`` chooses the kind.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))
        self.bias: torch.nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x; no collective."""
        shape, wide = self.weight.shape, x.float()
        weight = self.weight.float() + 1  # in bf16 a weight near 0 would be rounded to 1 +- 2^-8
        if self.bias is None:
            out = torch.nn.functional.rms_norm(wide, shape, weight, self.eps)
        else:
            bias = self.bias.float()
            out = torch.nn.functional.layer_norm(wide, shape, weight, bias, self.eps)
        return out.to(x.dtype)


def use_zero_centered_norms(layer: Any) -> None:
    """Put ``ZeroCenteredNorm`` wherever the TransformerLayer's submodules ``layer`` have a norm."""
    for part in (layer, layer.self_attention.submodules):
        for name in (
            "input_layernorm",
            "pre_mlp_layernorm",
            "q_layernorm",
            "k_layernorm",
            "kv_layernorm",
        ):
            if getattr(part, name, IdentityOp) is not IdentityOp:
                setattr(part, name, ZeroCenteredNorm)
