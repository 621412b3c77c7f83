"""Layer specs of a block draft: stock TransformerLayers with a norm of each query and key head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.layers.backend import LayerBackend
from megatron_eagle.layers.lean_layers import RMSNorm


class HeadNorm(RMSNorm):
    """RMSNorm of each head, [..., d] -> [..., d]; the weight [d] is the same on every TP rank.

    A rank's heads give its gradient a part. Megatron sums the parts only if the *base* has such
    norms or runs sequence-parallel, so here they are summed whatever the base is: each rank gives T
    times its part, and Megatron averages them over the T ranks when it finishes gradients.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, eps)
        self.ranks = config.tensor_model_parallel_size
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]
        self.weight.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Norm x; differentiable in x and the weight, no collective."""
        weight = _scaled_gradient(self.weight, self.ranks)
        if x.is_cuda:
            return torch.nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)
        return self.apply_to(x, weight)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def _scaled_gradient(x: Tensor, factor: int) -> Tensor:
    return x if factor == 1 else _ScaledGradient.apply(x, factor)


def block_layer_specs(backend: LayerBackend, config: Any) -> list[Any]:
    """Return TransformerLayer specs of the ``config.num_layers`` layers."""
    specs = [backend.layer_spec(config) for _ in range(config.num_layers)]
    for spec in specs:
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = HeadNorm
    return specs
