"""How a sequence is cut over the context-parallel group, and what its ranks tell each other.

Megatron's zigzag: S positions are cut into 2 * CP equal pieces, and rank r holds piece r and piece
2 * CP - 1 - r, one after the other, so that causal attention costs every rank the same. Under
sequence parallelism these rows are cut over the tensor-parallel group once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ContextShard:
    """The positions that rank ``rank`` of ``world`` holds of a sequence of ``length``."""

    length: int
    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, length: int, group: ProcessGroup) -> ContextShard:
        """This rank's part; ``length`` must be a multiple of 2 * CP if CP > 1."""
        assert group.size() == 1 or length % (2 * group.size()) == 0
        return cls(length, group.rank(), group.size())

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The (start, stop) of this rank's pieces, in the order in which it holds them."""
        if self.world == 1:
            return [(0, self.length)]
        size = self.length // (2 * self.world)
        pieces = (self.rank, 2 * self.world - 1 - self.rank)
        return [(piece * size, (piece + 1) * size) for piece in pieces]

    def take(self, full: Tensor, dim: int) -> Tensor:
        """This rank's part of ``full``, whose ``dim`` is the whole sequence."""
        if self.world == 1:
            return full
        return torch.cat([full.narrow(dim, a, b - a) for a, b in self.spans], dim)


def gather_key_value(key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """This rank's key [B, g, S / CP, d] and value [B, g, S / CP, dv] as the whole sequence's
    [B, g, S, d] and [B, g, S, dv], positions in order, on every rank.

    One all-gather over ``group``; backward one reduce-scatter. Nothing happens when CP is 1.
    """
    if group.size() == 1:
        return key, value
    sizes = [key.shape[-1], value.shape[-1]]
    rows = torch.cat([key, value], dim=-1).permute(2, 0, 1, 3)
    whole = _GatherSequence.apply(rows, group)
    first, second = whole.permute(1, 2, 0, 3).split(sizes, dim=-1)
    return first, second


@torch.no_grad()
def append_halo(rows: Tensor, halo: int, group: ProcessGroup) -> Tensor:
    """This rank's two pieces [S / CP, ...], each followed by the ``halo`` rows that follow it in
    the sequence: [S / CP + 2 * halo, ...]. After the last piece they are zeros.

    One all-gather over ``group`` of 2 * halo rows a rank; ``rows`` itself when CP is 1. A piece
    must have at least ``halo`` rows.
    """
    world, rank = group.size(), group.rank()
    if world == 1:
        return rows
    first, second = rows.chunk(2)
    heads = _in_order(_all_gather(torch.cat([first[:halo], second[:halo]]), group), world)
    after = torch.cat([heads, torch.zeros_like(heads[:halo])]).split(halo)
    return torch.cat([first, after[rank + 1], second, after[2 * world - rank]])


@torch.no_grad()
def gather_sequence(rows: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's two pieces [S / CP, ...] as the whole sequence [S, ...], on every rank. One
    all-gather over ``group``; ``rows`` itself when CP is 1."""
    return rows if group.size() == 1 else _in_order(_all_gather(rows, group), group.size())


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _in_order(_all_gather(rows, group), group.size())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        world = ctx.group.size()
        by_rank = _by_rank(grads[0], world).contiguous()
        mine = by_rank.new_empty(by_rank.shape[0] // world, *by_rank.shape[1:])
        torch.distributed.reduce_scatter_tensor(mine, by_rank, group=ctx.group)
        return mine, None


def _all_gather(rows: Tensor, group: ProcessGroup) -> Tensor:
    """[n, ...] of every rank as [CP * n, ...], rank after rank."""
    received = rows.new_empty(group.size() * rows.shape[0], *rows.shape[1:])
    torch.distributed.all_gather_into_tensor(received, rows.contiguous(), group=group)
    return received


def _in_order(by_rank: Tensor, world: int) -> Tensor:
    """The ranks' pairs of pieces [S, ...] as the pieces in the sequence's order."""
    pieces = by_rank.unflatten(0, (world, 2, -1))
    return torch.cat([pieces[:, 0], pieces[:, 1].flip(0)]).flatten(0, 1)


def _by_rank(in_order: Tensor, world: int) -> Tensor:
    """The inverse of :func:`_in_order`."""
    pieces = in_order.unflatten(0, (2 * world, -1))
    return torch.stack([pieces[:world], pieces[world:].flip(0)], dim=1).flatten(0, 2)
