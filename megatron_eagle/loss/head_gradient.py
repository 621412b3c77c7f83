"""Add the gradient of the head to a buffer that outlives the micro-batch.

Megatron's DistributedDataParallel keeps an fp32 ``main_grad`` of every parameter. Autograd would
round the gradient of a micro-batch to the head's dtype and hand it to a hook that adds it there:
matrices as large as the vocabulary. The loss adds its chunks to ``main_grad`` itself.

Shape letters: Dp this rank's shard of the draft vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadGradient:
    """Where the gradient of the head's rows is added up, in the place of autograd.

    Attributes:
        total: [Dp, H] fp32, a view of the parameter's ``main_grad``.
        scale: scalar, by what the loss will be multiplied before its backward. A gradient made in
            forward needs it beforehand.
    """

    total: Tensor
    scale: Tensor

    def check_scale(self, scale: Tensor) -> None:
        """Raise, or stop the device, unless ``scale`` is what was expected; never waits for it.

        NaN passes: it makes the other gradients NaN, and whoever trains looks for that.
        """
        found = scale.float()
        same = ((found == self.scale) | found.isnan()).all()
        torch._assert_async(same, "the loss was not multiplied by the scale it was made for")


def no_gradient(weight: Tensor) -> Tensor:
    """Return what takes the place of a gradient of ``weight``: a zero in its shape, no memory."""
    return weight.new_zeros(()).expand_as(weight)


class RowsAddedElsewhere(torch.autograd.Function):
    """The first rows of a weight [N, H], whose gradient somebody adds to its ``main_grad``.

    Backward says so to Megatron's hook by ``grad_added_to_main_grad``. The hook must find some
    gradient, which it drops unread: the weight itself, so that none is allocated.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: int) -> Tensor:
        """Return weight[:rows]; its gradient is ignored."""
        ctx.weight = weight
        return weight[:rows]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.weight.grad_added_to_main_grad = True
        return ctx.weight.detach(), None
