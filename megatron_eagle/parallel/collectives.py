"""Gather tensors from the ranks of a process group, where no gradient is needed.

Where autograd must cross the ranks, the package uses Megatron's own mappings instead.
Shape letter: T ranks of the group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def all_gather(part: Tensor, group: ProcessGroup) -> Tensor:
    """Gather ``part`` [n, ...] of every rank as [T, n, ...], in the order of ranks, on every rank.

    ``part`` must have one shape on all ranks. One all-gather over ``group``; a group of one rank
    sends nothing and gets a view of ``part``. Not differentiable.
    """
    if group.size() == 1:
        return part.unsqueeze(0)
    gathered = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
    torch.distributed.all_gather_into_tensor(gathered, part.contiguous(), group=group)
    return gathered.view(group.size(), *part.shape)
