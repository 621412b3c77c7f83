"""Compute EAGLE-1's second loss, which pulls the draft's hidden towards the base's own.

Shape letters: K TTT steps, M target positions of a micro-batch, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def hidden_regression(
    hidden: Tensor, target: Tensor, mask: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return the smooth-L1 loss between the draft's hidden and the base's, mean over H, summed over
    the positions of each step: [K] fp32 twice, to differentiate and detached.

    hidden [K, M, H] of every step and target [M, H], the base's final hidden at the target
    positions, both full on every TP rank; mask [K, M]. As with the heads' loss, the gradient of
    hidden is this rank's partial sum over ``group``; here every rank contributes an equal part. No
    collective.
    """
    difference = torch.nn.functional.smooth_l1_loss(
        hidden.float(), target.float().expand(hidden.shape), reduction="none"
    )
    sums = (difference.mean(-1) * mask).sum(-1)
    values = sums.detach()
    part = sums / group.size()
    return values + (part - part.detach()), values
