"""One look-up of the base's frozen embedding for all TTT steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.compat import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron_eagle.parallel.vocab import VocabShard


@torch.no_grad()
def step_embeddings(
    tokens: Tensor,
    weight: Tensor,
    vocab_size: int,
    steps: int,
    group: ProcessGroup,
    sequence_parallel: bool,
    spans: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Embeddings of x_1 .. x_{S+K-1} from this rank's rows ``weight`` [Vp, H] of the base's.

    tokens [B, S] -> [R, S' / R + K - 1, B, H] for the S' rows of this rank, which lie in R runs of
    positions: the ``spans`` of its context-parallel part (by default one, the whole sequence),
    each cut over TP under sequence parallelism. Step t consumes rows t .. t + S' / R - 1 of every
    run. Tokens beyond the sequence read id 0: the rows that consume them are never supervised. One
    all-reduce or reduce-scatter over TP.
    """
    spans = spans or [(0, tokens.shape[1])]
    parts = group.size() if sequence_parallel else 1
    size = (spans[0][1] - spans[0][0]) // parts
    padded = torch.nn.functional.pad(tokens[:, 1:], (0, steps))  # x_1 .. x_{S+K-1}
    windows = torch.stack(
        [
            padded[:, low : low + size + steps - 1]
            for start, stop in spans
            for low in range(start, stop, size)
        ]
    )
    rows = windows.transpose(1, 2).flatten(0, 1)  # [parts * R * (S' / R + K - 1), B]
    found = _lookup(rows, weight, vocab_size, group, sequence_parallel)
    return found.unflatten(0, (len(spans), -1))


@torch.no_grad()
def token_embeddings(
    tokens: Tensor,
    weight: Tensor,
    vocab_size: int,
    group: ProcessGroup,
    sequence_parallel: bool = False,
) -> Tensor:
    """Embeddings [n, B, H] of tokens [B, n] from this rank's rows ``weight`` [Vp, H] of the base's,
    or under sequence parallelism this rank's part of them. One all-reduce or reduce-scatter over
    TP."""
    return _lookup(tokens.t(), weight, vocab_size, group, sequence_parallel)


@torch.no_grad()
def token_embedding(token: int, weight: Tensor, vocab_size: int, group: ProcessGroup) -> Tensor:
    """[H]: the embedding of one token, on every rank. One all-reduce over ``group``."""
    ids = torch.tensor([token], device=weight.device)
    return _lookup(ids, weight, vocab_size, group, sequence_parallel=False)[0]


def _lookup(
    ids: Tensor, weight: Tensor, vocab_size: int, group: ProcessGroup, sequence_parallel: bool
) -> Tensor:
    found = _partial_lookup(ids, weight, vocab_size, group)
    sum_over_ranks = (
        reduce_scatter_to_sequence_parallel_region
        if sequence_parallel and group.size() > 1
        else reduce_from_tensor_model_parallel_region
    )
    return sum_over_ranks(found, group=group)


def _partial_lookup(ids: Tensor, weight: Tensor, vocab_size: int, group: ProcessGroup) -> Tensor:
    """Rows of this rank's ids, zeros for the others': summed over TP they are the embeddings."""
    if group.size() == 1:
        return torch.nn.functional.embedding(ids, weight)
    start = VocabShard.of(vocab_size, group, weight.shape[0]).start
    local = ids - start
    outside = (local < 0) | (local >= weight.shape[0])
    found = torch.nn.functional.embedding(local.masked_fill(outside, 0), weight)
    return found.masked_fill(outside.unsqueeze(-1), 0.0)
