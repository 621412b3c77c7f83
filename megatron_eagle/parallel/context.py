"""Cut a sequence over the context-parallel group, and gather what its ranks hold.

Megatron's zigzag: S positions are cut into 2 * CP equal pieces, and rank r holds piece r and piece
2 * CP - 1 - r, one after the other, so that causal attention costs every rank the same. With CP 2,
rank 0 holds pieces 0 and 3, rank 1 pieces 1 and 2. Under sequence parallelism a rank's positions
are cut over the tensor-parallel group once more.

Shape letters: S sequence, B micro-batch, g key/value heads, d and dv head sizes of keys and values,
CP ranks of the context-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.parallel.collectives import all_gather


@dataclass(frozen=True)
class ContextShard:
    """Positions of a sequence of ``length`` that rank ``rank`` of ``world`` holds."""

    length: int
    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, length: int, group: ProcessGroup) -> ContextShard:
        """Return this rank's part; ``length`` must be a multiple of 2 * CP if CP > 1."""
        assert group.size() == 1 or length % (2 * group.size()) == 0
        return cls(length, group.rank(), group.size())

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Return (start, stop) of this rank's pieces, in the order in which it holds them."""
        if self.world == 1:
            return [(0, self.length)]
        size = self.length // (2 * self.world)
        pieces = (self.rank, 2 * self.world - 1 - self.rank)
        return [(piece * size, (piece + 1) * size) for piece in pieces]

    def take(self, full: Tensor, dim: int) -> Tensor:
        """Return this rank's part of ``full``, whose dimension ``dim`` is the whole sequence."""
        if self.world == 1:
            return full
        return torch.cat([full.narrow(dim, a, b - a) for a, b in self.spans], dim)


def gather_key_value(key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Gather this rank's key [B, g, S / CP, d] and value [B, g, S / CP, dv] as the whole sequence's
    [B, g, S, d] and [B, g, S, dv], positions in order, on every rank.

    One all-gather over ``group``; backward one reduce-scatter. Nothing happens when CP is 1.
    """
    if group.size() == 1:
        return key, value
    sizes = [key.shape[-1], value.shape[-1]]
    local = torch.cat([key, value], dim=-1).permute(2, 0, 1, 3)
    full = _GatherSequence.apply(local, group)
    full_key, full_value = full.permute(1, 2, 0, 3).split(sizes, dim=-1)
    return full_key, full_value


@torch.no_grad()
def append_halo(hidden: Tensor, halo: int, group: ProcessGroup) -> Tensor:
    """Append to each of this rank's two pieces [S / CP, ...] the ``halo`` positions that follow it
    in the sequence: [S / CP + 2 * halo, ...]. After the sequence's end they are zeros.

    One all-gather over ``group`` of 2 * halo positions a rank; ``hidden`` itself when CP is 1. A
    piece must have at least ``halo`` positions. Not differentiable.
    """
    world, rank = group.size(), group.rank()
    if world == 1:
        return hidden
    first, second = hidden.chunk(2)
    heads = _in_order(all_gather(torch.cat([first[:halo], second[:halo]]), group))
    after = torch.cat([heads, torch.zeros_like(heads[:halo])]).split(halo)
    return torch.cat([first, after[rank + 1], second, after[2 * world - rank]])


@torch.no_grad()
def gather_sequence(local: Tensor, group: ProcessGroup) -> Tensor:
    """Gather this rank's two pieces [S / CP, ...] as the whole sequence [S, ...] on every rank.

    One all-gather over ``group``; ``local`` itself when CP is 1. Not differentiable.
    """
    return local if group.size() == 1 else _in_order(all_gather(local, group))


class _GatherSequence(torch.autograd.Function):
    """Gather pieces [S / CP, ...] as [S, ...]; backward reduce-scatters the gradient."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _in_order(all_gather(local, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        world = ctx.group.size()
        by_rank = _by_rank(grads[0], world).contiguous()
        local = by_rank.new_empty(by_rank.shape[0] // world, *by_rank.shape[1:])
        torch.distributed.reduce_scatter_tensor(local, by_rank, group=ctx.group)
        return local, None


def _in_order(by_rank: Tensor) -> Tensor:
    """Put the ranks' pairs of pieces [CP, S / CP, ...] in the sequence's order: [S, ...]."""
    pairs = by_rank.unflatten(1, (2, -1))
    return torch.cat([pairs[:, 0], pairs[:, 1].flip(0)]).flatten(0, 1)


def _by_rank(in_order: Tensor, world: int) -> Tensor:
    """Put a sequence [S, ...] in the order of ranks, rank after rank: [S, ...]."""
    pieces = in_order.unflatten(0, (2 * world, -1))
    return torch.stack([pieces[:world], pieces[world:].flip(0)], dim=1).flatten(0, 2)
