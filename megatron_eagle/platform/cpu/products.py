"""Matrix products by the fastest kernel that the processor has.

PyTorch hands fp32 products on a CPU to MKL. oneDNN, also part of PyTorch, takes from 1.2 times as
long to half as long, depending on the processor: ``kernel_choice`` measures it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.platform.cpu.kernel_choice import onednn_is_faster

_CACHED_BYTES = 4 << 20


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [N, H] @ weight [M, H]ᵀ -> [N, M], in their dtype; not differentiable."""
    if _by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.mm(x, weight.t())


def add_outer_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left [N, M]ᵀ @ right [N, H], of any dtype, to total [M, H] fp32 in place."""
    if _by_onednn(left, right):
        # It cannot add to its output: pieces small enough that adding finds them in the cache.
        rows = max(1, _CACHED_BYTES // (4 * right.shape[1]))
        for part, columns in zip(total.split(rows), left.split(rows, dim=1), strict=True):
            part += product(columns.t(), right.t())
    elif left.dtype == torch.float32:
        total.addmm_(left.t(), right)
    else:
        total += left.t() @ right


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [..., H] @ weight [M, H]ᵀ -> [..., M], differentiable in both."""
    if not _by_onednn(x, weight):
        return torch.nn.functional.linear(x, weight)
    return _Linear.apply(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = product(grads[0], weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = product(grads[0].t(), x.t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def _by_onednn(x: Tensor, y: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == y.dtype == torch.float32
        and min(x.numel(), y.numel()) > 0
        and onednn_is_faster()
    )


def default_output_bytes() -> int:
    """Return how many bytes of results each product should have to run near full speed.

    MKL needs more rows in a product than oneDNN does before it comes near the processor's speed.
    """
    return (32 if onednn_is_faster() else 56) << 20
