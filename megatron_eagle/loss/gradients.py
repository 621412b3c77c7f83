"""Add up the gradients of the draft's hidden and head from chunks of target positions."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_eagle.parallel.products import add_outer_, product


class GradientSums:
    """Gradients of hidden [K, M, H] and head weight [Dp, H]; the weight's, if it needs one, in
    fp32 until :meth:`finish`. K TTT steps, M target positions, Dp this rank's draft vocabulary."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden, self.weight = hidden, weight
        self.grad_hidden = torch.empty_like(hidden)
        self.grad_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        )

    def add(self, chunk: slice, grad_logits: Tensor, row_weight: Tensor) -> None:
        """Add the c positions ``chunk``: the gradient of each loss on its logits [K, c, Dp], times
        ``row_weight`` [K, c]. No collective."""
        grad = grad_logits.flatten(0, 1)
        row_weight = row_weight.to(self.hidden.dtype).unsqueeze(-1)
        out = self.grad_hidden[:, chunk]
        torch.mul(product(grad, self.weight.t()).view_as(out), row_weight, out=out)
        if self.grad_weight is not None:
            weighted = (self.hidden[:, chunk] * row_weight).flatten(0, 1)
            add_outer_(self.grad_weight, grad, weighted)

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Return both gradients in their parameters' dtypes."""
        if self.grad_weight is None:
            return self.grad_hidden, None
        return self.grad_hidden, self.grad_weight.to(self.weight.dtype)
