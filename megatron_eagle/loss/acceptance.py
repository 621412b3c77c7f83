"""Losses of the acceptance rate alpha = Σ min(P, q).

P = p * coverage is the base's softmax over its whole vocabulary at the draft's tokens: what a
verifier compares q with, so that it accepts a token drafted from q with probability alpha.
d alpha / d z = q (m - Σ m q) with m = 1 where q < P.

Shape letters as in :mod:`megatron_eagle.loss.row_loss`: K TTT steps, N target positions, Dp this
rank's shard of the draft vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from megatron_eagle.kernels.choice import with_kernel
from megatron_eagle.loss.reduction import ReducedStats, ShardMass
from megatron_eagle.loss.row_loss import TINY, RowLoss, RowValues


class AcceptanceLoss(RowLoss):
    """A loss of alpha, mixed with the soft cross-entropy or not: its gradient is a sum of q - p and
    -d alpha / d z, whose two factors depend on alpha."""

    needs_overlap = True

    @abstractmethod
    def loss(self, alpha: Tensor, cross_entropy: Tensor) -> Tensor:
        """Return the loss [K, N] from alpha and the soft cross-entropy [K, N]."""

    @abstractmethod
    def factors(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors [K, N] of q - p and of -d alpha / d z in the gradient."""

    def value(self, reduced: ReducedStats) -> RowValues:
        assert reduced.overlap is not None
        alpha, below = reduced.overlap
        loss = self.loss(alpha, reduced.cross_entropy)
        return RowValues(loss, (below, *self.factors(alpha)))

    def gradient_(
        self, draft: Tensor, teacher: Tensor, mass: ShardMass, terms: tuple[Tensor, ...]
    ) -> None:
        _gradient_(draft, teacher, *mass, *terms)


@with_kernel("megatron_eagle.kernels.acceptance:acceptance_gradient_")
def _gradient_(
    draft: Tensor,
    teacher: Tensor,
    mass: Tensor,
    teacher_mass: Tensor,
    coverage: Tensor,
    below: Tensor,
    kl_factor: Tensor,
    alpha_factor: Tensor,
) -> None:
    """Overwrite the softmax ``draft`` with kl_factor (q - p) - alpha_factor d alpha / d z."""
    p = teacher * teacher_mass.unsqueeze(-1)
    full = p * coverage.unsqueeze(-1)
    steps = zip(draft, mass, below, kl_factor, alpha_factor, strict=True)
    for step, step_mass, step_below, step_kl, step_alpha in steps:
        q = step.float() * step_mass.unsqueeze(-1)
        slope = q * (step_below.unsqueeze(-1) - (q < full).float())
        step.copy_(step_kl.unsqueeze(-1) * (q - p) + step_alpha.unsqueeze(-1) * slope)


class TotalVariation(AcceptanceLoss):
    """1 - alpha (``tv``): half the L1 distance of q and the base's whole softmax."""

    def loss(self, alpha: Tensor, cross_entropy: Tensor) -> Tensor:
        return 1 - alpha

    def factors(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), torch.ones_like(alpha)


class LogAcceptance(AcceptanceLoss):
    """-log alpha (``lk-alpha``; arXiv 2602.23881)."""

    def loss(self, alpha: Tensor, cross_entropy: Tensor) -> Tensor:
        return -alpha.clamp_min(TINY).log()

    def factors(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), alpha.clamp_min(TINY).reciprocal()


class MixedAcceptance(AcceptanceLoss):
    """w kl + (1 - w) tv with w = exp(-decay alpha) of each position, not differentiated
    (``lk-lambda``; arXiv 2602.23881)."""

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def loss(self, alpha: Tensor, cross_entropy: Tensor) -> Tensor:
        kl_weight, alpha_weight = self.factors(alpha)
        return kl_weight * cross_entropy + alpha_weight * (1 - alpha)

    def factors(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        weight = (-self.decay * alpha).exp()
        return weight, 1 - weight
