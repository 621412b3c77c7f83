"""Look up the base's frozen embedding, once for all TTT steps.

Shape letters: S sequence, B micro-batch, H hidden size, Vp this rank's rows of the base's
vocabulary, K TTT steps, T tensor-parallel ranks, U tokens that a rank looks up.
"""

from __future__ import annotations

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
    lookup: Tensor,
    weight: Tensor,
    vocab_size: int,
    steps: int,
    group: ProcessGroup,
    sequence_parallel: bool,
) -> Tensor:
    """Look up the tokens that this rank's TTT steps consume in its rows ``weight`` [Vp, H].

    tokens [B, S]; ``lookup`` [T, U] are flat entries of the tokens padded to [B, S + K], a row per
    tensor-parallel rank under sequence parallelism, otherwise a single row. Returns this rank's
    [U, H]. Tokens beyond the sequence read id 0: the positions that consume them are never
    supervised. One all-reduce over TP, or a reduce-scatter under sequence parallelism. Not
    differentiable.
    """
    padded = torch.nn.functional.pad(tokens, (0, steps)).flatten()
    return _lookup(padded[lookup.flatten()], weight, vocab_size, group, sequence_parallel)


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
