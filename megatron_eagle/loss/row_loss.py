"""Define what a loss is: three functions of one vocabulary shard.

A loss compares, at each target position and TTT step, the draft's softmax q with the base's p over
the draft vocabulary. Each rank sees its shard of both only. So a loss says which extra statistic of
a shard it wants gathered (:meth:`RowLoss.extra_statistic`), what its value is once the statistics
of all shards are known (:meth:`RowLoss.value`), and what its gradient is on the shard's own logits
(:meth:`RowLoss.gradient_`). :mod:`megatron_eagle.loss.cross_entropy` has the simplest two.

Shape letters: K TTT steps, N target positions, Dp this rank's shard of the draft vocabulary. The
softmaxes ``draft`` [K, N, Dp] and ``teacher`` [N, Dp] are normalised over the shard alone;
:class:`megatron_eagle.loss.reduction.ShardMass` makes them parts of q and p.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_eagle.loss.reduction import ReducedStats, ShardMass

TINY = torch.finfo(torch.float32).tiny
"""Least normal fp32 number: a smaller probability counts as it, where its logarithm is taken."""


class RowValues(NamedTuple):
    """Loss of each position and step, and what its gradient needs beside the shard's softmaxes."""

    loss: Tensor
    """[K, N]."""
    terms: tuple[Tensor, ...] = ()
    """Tensors [..., N]; :meth:`RowLoss.gradient_` gets those of its chunk of positions."""


class RowLoss(ABC):
    """A loss of q against p; it holds no tensors. The sum over positions and steps is the caller's.

    ``draft_softmax_`` overwrites logits with a softmax; the three functions only read it, and
    ``gradient_`` overwrites it once more.
    """

    extra_from: Literal["logits", "softmax"] | None = None
    """Whether a fifth statistic of a shard is gathered, made of its logits or of their softmax."""
    needs_overlap = False
    """Whether ``value`` reads ``ReducedStats.overlap``, which costs a second reduction."""
    fuses_subtraction = False
    """Whether the gradient is q - p: a single rank then subtracts p in the softmax's own pass and
    never calls ``gradient_``. Such a loss must not have an extra statistic of the softmax."""

    def extra_statistic(self, draft: Tensor, teacher: Tensor) -> Tensor:
        """Return a statistic [K, N] fp32 of this shard.

        ``draft`` [K, N, Dp] are logits or their softmax, as ``extra_from`` says; ``teacher``
        [N, Dp] is a softmax. Dp may be 0. No collective.
        """
        raise NotImplementedError

    @abstractmethod
    def value(self, reduced: ReducedStats) -> RowValues:
        """Return the loss, the same on every rank, and the terms of the gradient. No collective."""

    @abstractmethod
    def gradient_(
        self, draft: Tensor, teacher: Tensor, mass: ShardMass, terms: tuple[Tensor, ...]
    ) -> None:
        """Overwrite the softmax ``draft`` [K, N, Dp] with the gradient of each position's loss on
        this shard's logits. ``mass`` and ``terms`` are of the same N positions. No collective."""
