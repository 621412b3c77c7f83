"""Plain greedy decoding of the base, the judge of everything speculative."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megatron_eagle.decode.base import CachedBase
from megatron_eagle.decode.cache import KeyValueCache
from megatron_eagle.decode.sequences import Sequences


@torch.no_grad()
def greedy_decode(
    base: CachedBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int] = (),
) -> list[list[int]]:
    """The base's greedy continuation of each prompt, all prompts in one batch."""
    sequences = Sequences(prompts, max_new_tokens, stop_ids, base.device)
    cache = KeyValueCache(sequences.capacity)
    _, final = prefill(base, sequences, cache)
    while True:
        sequences.append(base.argmax(final).unsqueeze(1), torch.ones_like(sequences.lengths))
        if sequences.finished:
            return sequences.answers()
        kept = sequences.compact()
        if kept is not None:
            cache.keep(kept)
        positions = sequences.lengths.unsqueeze(1) - 1
        final = base.run(sequences.tokens.gather(1, positions), positions, cache)[1][0]


def prefill(base: CachedBase, sequences: Sequences, cache: KeyValueCache) -> tuple[Tensor, Tensor]:
    """Run the prompts: what a draft reads of them (see :meth:`CachedBase.run`) and the final hidden
    of each last token [B, H]."""
    tokens, positions = sequences.padded_prompts()
    features, final = base.run(tokens, positions, cache)
    return features, select_rows(final, sequences.lengths - 1)


def select_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """Row ``rows[b]`` of each sequence b of ``hidden`` [S, B, H]: [B, H]."""
    return hidden[rows, torch.arange(rows.numel(), device=rows.device)]
