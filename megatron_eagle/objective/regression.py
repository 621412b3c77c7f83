"""EAGLE-1's second loss: the draft's hidden shall be the base's own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def hidden_regression(
    hidden: Tensor, target: Tensor, mask: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Smooth-L1 between the draft's hidden and the base's, mean over H, summed over rows.

    hidden [K, M, H] of every step and target [M, H], the base's final hidden at the target rows,
    both full on every TP rank; mask [K, M]. Returns the sums of each step [K] twice, fp32: to
    differentiate, and detached. As with the heads' loss, hidden's gradient is this rank's partial
    sum over ``group``: here every rank contributes an equal part. No collective.
    """
    difference = torch.nn.functional.smooth_l1_loss(
        hidden.float(), target.float().expand(hidden.shape), reduction="none"
    )
    sums = (difference.mean(-1) * mask).sum(-1)
    whole = sums.detach()
    part = sums / group.size()
    return whole + (part - part.detach()), whole
