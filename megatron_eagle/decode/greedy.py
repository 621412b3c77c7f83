"""Plain greedy decoding with the base: the answers that speculative ones must equal.

B sequences, S tokens of each in a forward, H hidden size.
"""

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
    """Continue ``prompts`` greedily in one batch; return the answers' token ids.

    A generator for ``interleave.interleave``: it yields around every forward.
    """
    sequences = Sequences(prompts, max_new_tokens, stop_ids, base.device)
    cache = base.new_cache(sequences.capacity)
    forward = base.begin(*sequences.padded_prompts(), cache)
    yield
    final = select_tokens(base.finish(forward)[1], sequences.lengths - 1)
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


def select_tokens(hidden: Tensor, indices: Tensor) -> Tensor:
    """Select token ``indices[b]`` of each sequence b of ``hidden`` [S, B, H]: [B, H]."""
    return hidden[indices, torch.arange(indices.numel(), device=indices.device)]
