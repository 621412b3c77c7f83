"""Plain greedy decoding of the base, the judge of everything speculative."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megatron_eagle.decode.base import CachedBase
from megatron_eagle.decode.interleave import Steps
from megatron_eagle.decode.sequences import Sequences


def greedy_steps(
    base: CachedBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int] = (),
) -> Steps[list[list[int]]]:
    """The base's greedy continuation of each prompt, all prompts in one batch; for
    :func:`~megatron_eagle.decode.interleave.together`."""
    sequences = Sequences(prompts, max_new_tokens, stop_ids, base.device)
    cache = base.new_cache(sequences.capacity)
    forward = base.begin(*sequences.padded_prompts(), cache)
    yield
    final = select_rows(base.finish(forward)[1], sequences.lengths - 1)
    while True:
        sequences.append(base.argmax(final).unsqueeze(1), torch.ones_like(sequences.lengths))
        if sequences.finished:
            return sequences.answers()
        kept = sequences.compact()
        if kept is not None:
            cache.keep(kept)
        positions = sequences.lengths.unsqueeze(1) - 1
        yield
        forward = base.begin(sequences.tokens.gather(1, positions), positions, cache)
        yield
        final = base.finish(forward)[1][0]


def select_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """Row ``rows[b]`` of each sequence b of ``hidden`` [S, B, H]: [B, H]."""
    return hidden[rows, torch.arange(rows.numel(), device=rows.device)]
