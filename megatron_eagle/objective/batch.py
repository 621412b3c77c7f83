"""EagleBatch: tokens, and which rows are supervised at which step, worked out on the host.

Row p of step t consumes x_{p+1+t} and is judged by the base's distribution at u = p + 1 + t. So
the supervised rows of every step share one set of target positions u, and step t's row for u is
u - 1 - t: the teacher is evaluated once per u, never per step. Positions that are not supervised
reach neither the teacher nor the draft's head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EagleBatch:
    """A micro-batch of B sequences of S tokens, with M supervised target positions.

    tokens [B, S]. ``target_rows`` [M]: flat positions u * B + b of the targets in [S, B].
    ``step_rows`` [K, M]: flat positions of the rows judged at each step. ``step_mask`` [K, M]
    bool: False where that row would lie before the sequence (its entry in ``step_rows`` is then
    row 0, and unused).
    """

    tokens: Tensor
    target_rows: Tensor
    step_rows: Tensor
    step_mask: Tensor

    @classmethod
    def build(
        cls, tokens: Tensor, loss_mask: Tensor, steps: int, multiple: int = 1, trim: bool = False
    ) -> EagleBatch:
        """From host tensors: tokens [B, S]; loss_mask [B, S], whose entry i says whether the next
        token x_{i+1} is supervised (Megatron's label-aligned mask).

        ``trim`` cuts what follows the last target off all sequences, to a ``multiple`` (of TP, for
        sequence parallelism): causal layers never look there.
        """
        batch, length = tokens.shape
        target, sequence = (loss_mask[:, : length - 1].t() > 0).nonzero(as_tuple=True)
        target = target + 1  # u = p + 1 for the mask entry of p
        if trim:
            needed = int(target[-1]) + 1 if target.numel() else steps + 2
            length = min(length, -(-needed // multiple) * multiple)
        offset = torch.arange(steps).unsqueeze(-1)
        row = target.unsqueeze(0) - 1 - offset
        return cls(
            tokens=tokens[:, :length],
            target_rows=target * batch + sequence,
            step_rows=row.clamp(min=0) * batch + sequence,
            step_mask=row >= 0,
        )

    def to(self, device: torch.device | str | int) -> EagleBatch:
        """The same on ``device``; copies do not block the host."""
        return EagleBatch(
            *(
                x.pin_memory().to(device, non_blocking=True) if _on_gpu(device) else x
                for x in (self.tokens, self.target_rows, self.step_rows, self.step_mask)
            )
        )


def _on_gpu(device: torch.device | str | int) -> bool:
    return torch.cuda.is_available() and torch.device(device).type == "cuda"
