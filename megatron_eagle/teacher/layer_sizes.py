"""Measure how large the outputs of aux layers are, so that a fresh ``fc`` can weigh them equally.

S' this rank's tokens, B batch, H hidden size, A aux layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.parallel.collectives import all_gather


class StageForward(Protocol):
    """Interface of ``pipeline.exchange.StageExchange`` to a forward through all stages."""

    def local_aux_hidden(self, tokens: Tensor) -> dict[int, Tensor]:
        """Run tokens [B, S]; return this stage's aux hidden states [S', B, H] by layer id."""
        ...

    def sum_over_stages(self, values: Tensor) -> None:
        """Sum ``values`` over the stages, in place."""
        ...


def random_tokens(vocab_size: int, length: int, multiple: int) -> Tensor:
    """Return random tokens [1, n] on the host, the same on every rank; n is ``length`` rounded up
    to a ``multiple``. They need no data."""
    generator = torch.Generator().manual_seed(0)
    size = (1, -(-length // multiple) * multiple)
    return torch.randint(vocab_size, size, generator=generator)


@torch.no_grad()
def typical_rms(
    aux_hidden: Mapping[int, Tensor], layers: Sequence[int], groups: Sequence[ProcessGroup]
) -> dict[int, Tensor]:
    """Return the typical RMS of each layer's output, a scalar fp32 by layer id, the same on every
    rank.

    ``aux_hidden``: [S', B, H] by layer id, of those of ``layers`` that this stage holds;
    ``groups``: those that cut the sequence. A median over tokens, since first tokens carry massive
    activations. One all-gather per layer over each of ``groups``, so that no layout changes it.
    """
    sizes = {}
    for layer in layers:
        if layer not in aux_hidden:
            continue
        rms = aux_hidden[layer].float().square().mean(-1).sqrt().flatten()
        for group in groups:
            rms = all_gather(rms, group).flatten()
        sizes[layer] = rms.median()
    return sizes
