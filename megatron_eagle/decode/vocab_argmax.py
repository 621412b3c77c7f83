"""Argmax over a vocabulary that is cut over the tensor-parallel group.

H hidden size, Vp this rank's vocabulary shard, [...] any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.parallel.collectives import all_gather
from megatron_eagle.parallel.vocab import EMPTY_SHARD_MAX, combine_argmax


def vocab_argmax(hidden: Tensor, weight: Tensor, ids: Tensor, group: ProcessGroup) -> Tensor:
    """Return the ids [...] of the largest logits of ``hidden`` [..., H], the same on every rank;
    ties take the lowest id.

    ``weight`` [Vp, H] holds this rank's real rows (possibly none) and ``ids`` [Vp] their token ids,
    ascending. One all-gather of two numbers per token; none at TP 1.
    """
    if weight.shape[0] == 0:
        best = hidden.new_full(hidden.shape[:-1], EMPTY_SHARD_MAX)
        token = torch.zeros(best.shape, dtype=torch.int64, device=hidden.device)
    else:
        best, index = (hidden @ weight.t()).max(dim=-1)
        token = ids[index]
    if group.size() == 1:
        return token
    pair = torch.stack([best.double(), token.double()])  # ids are exact in fp64
    maxima, tokens = all_gather(pair, group).unbind(1)
    return combine_argmax(maxima, tokens)
