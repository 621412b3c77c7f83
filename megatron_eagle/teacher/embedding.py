"""Look up the base's frozen embedding, once for all TTT steps.

Shape letters: S sequence, B micro-batch, H hidden size, Vp this rank's rows of the base's
vocabulary, K TTT steps, R runs of positions on this rank; S' is S over the context-parallel and,
under sequence parallelism, the tensor-parallel ranks.
"""

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
    """Look up the embeddings of x_1 .. x_{S+K-1} in this rank's rows ``weight`` [Vp, H].

    tokens [B, S] -> [R, S' / R + K - 1, B, H] for the S' positions of this rank, which lie in R
    runs: the ``spans`` of its context-parallel part (by default one, the whole sequence), each cut
    over TP under sequence parallelism. Step t consumes entries t .. t + S' / R - 1 of every run.
    Tokens beyond the sequence read id 0: the positions that consume them are never supervised. One
    all-reduce over TP, or a reduce-scatter under sequence parallelism. Not differentiable.
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
    ids = windows.transpose(1, 2).flatten(0, 1)  # [parts * R * (S' / R + K - 1), B]
    embeddings = _lookup(ids, weight, vocab_size, group, sequence_parallel)
    return embeddings.unflatten(0, (len(spans), -1))


@torch.no_grad()
def token_embeddings(
    tokens: Tensor,
    weight: Tensor,
    vocab_size: int,
    group: ProcessGroup,
    sequence_parallel: bool = False,
) -> Tensor:
    """Look up the embeddings [n, B, H] of tokens [B, n] in this rank's rows ``weight`` [Vp, H];
    under sequence parallelism, return this rank's part of them. One all-reduce or reduce-scatter
    over TP. Not differentiable."""
    return _lookup(tokens.t(), weight, vocab_size, group, sequence_parallel)


@torch.no_grad()
def token_embedding(token: int, weight: Tensor, vocab_size: int, group: ProcessGroup) -> Tensor:
    """Look up the embedding [H] of one token, on every rank. One all-reduce over ``group``. Not
    differentiable."""
    ids = torch.tensor([token], device=weight.device)
    return _lookup(ids, weight, vocab_size, group, sequence_parallel=False)[0]


def _lookup(
    ids: Tensor, weight: Tensor, vocab_size: int, group: ProcessGroup, sequence_parallel: bool
) -> Tensor:
    partial = _partial_lookup(ids, weight, vocab_size, group)
    sum_over_ranks = (
        reduce_scatter_to_sequence_parallel_region
        if sequence_parallel and group.size() > 1
        else reduce_from_tensor_model_parallel_region
    )
    return sum_over_ranks(partial, group=group)


def _partial_lookup(ids: Tensor, weight: Tensor, vocab_size: int, group: ProcessGroup) -> Tensor:
    """Look up this rank's ids, and zeros for other ranks' ids: the sum over TP is complete."""
    if group.size() == 1:
        return torch.nn.functional.embedding(ids, weight)
    start = VocabShard.of(vocab_size, group, weight.shape[0]).start
    local = ids - start
    outside = (local < 0) | (local >= weight.shape[0])
    partial = torch.nn.functional.embedding(local.masked_fill(outside, 0), weight)
    return partial.masked_fill(outside.unsqueeze(-1), 0.0)
