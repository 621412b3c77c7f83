"""One look-up of the base's frozen embedding for all TTT steps."""

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
    weight: Tensor,
    vocab_size: int,
    steps: int,
    group: ProcessGroup,
    sequence_parallel: bool,
) -> Tensor:
    """Embeddings of x_1 .. x_{S+K-1} from this rank's rows ``weight`` [Vp, H] of the base's.

    tokens [B, S] -> [S' + K - 1, B, H], of which rows t .. t+S'-1 are what step t consumes; S' = S,
    or this rank's S / TP rows under sequence parallelism. Tokens beyond the sequence read id 0:
    the rows that consume them are never supervised. One all-reduce or reduce-scatter over TP.
    """
    batch, length = tokens.shape
    padded = torch.nn.functional.pad(tokens[:, 1:], (0, steps))  # x_1 .. x_{S+K-1}
    if not sequence_parallel or group.size() == 1:
        rows = padded.t().contiguous()
        return reduce_from_tensor_model_parallel_region(
            _partial_lookup(rows, weight, vocab_size, group), group=group
        )
    part = length // group.size()
    windows = padded.unfold(1, part + steps - 1, part)  # [B, TP, S' + K - 1]
    rows = windows.permute(1, 2, 0).reshape(-1, batch)
    return reduce_scatter_to_sequence_parallel_region(
        _partial_lookup(rows, weight, vocab_size, group), group=group
    )


def _partial_lookup(ids: Tensor, weight: Tensor, vocab_size: int, group: ProcessGroup) -> Tensor:
    """Rows of this rank's ids, zeros for the others': summed over TP they are the embeddings."""
    if group.size() == 1:
        return torch.nn.functional.embedding(ids, weight)
    start = VocabShard.of(vocab_size, group, weight.shape[0]).start
    local = ids - start
    outside = (local < 0) | (local >= weight.shape[0])
    found = torch.nn.functional.embedding(local.masked_fill(outside, 0), weight)
    return found.masked_fill(outside.unsqueeze(-1), 0.0)
