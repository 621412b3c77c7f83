"""The losses of a draft's row q against the base's p, from shards of both.

Each is written for a rank's part of the vocabulary: what its shard tells the others beside the four
statistics of :mod:`megatron_eagle.loss.reduction`, the value from what all shards told, and
the gradient on this shard's logits. p is the base's softmax over the draft vocabulary; P = p *
coverage is its part of the whole vocabulary's, what a verifier compares q with, so that
alpha = Σ min(P, q) is the probability that it accepts a drafted token.

Softmaxes of a shard come as in :class:`megatron_eagle.loss.soft_cross_entropy._Chunk`: draft
[K, N, Dp] and teacher [N, Dp], relative to the shard; q = draft * ratio, p = teacher * scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eagle.loss.reduction import Reduced
from megatron_eagle.loss.shard_softmax import rescale_

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Shares:
    """What makes this shard's softmaxes parts of the whole: ``ratio`` [K, N], ``scale`` [N]; and
    ``coverage`` [N], the base's probability inside the draft vocabulary."""

    ratio: Tensor
    scale: Tensor
    coverage: Tensor

    def of(self, rows: slice) -> Shares:
        return Shares(self.ratio[:, rows], self.scale[rows], self.coverage[rows])


class SoftCrossEntropy:
    """-Σ p log q (``kl``): the Kullback-Leibler divergence from p, up to p's own entropy."""

    adds = False
    """Whether a shard adds a statistic to its four."""
    overlaps = False
    """Whether Σ min(P, q) and Σ q over q < P, which need log Z first, are reduced too."""

    def from_logits(self, logits: Tensor, teacher: Tensor) -> Tensor | None:
        """A statistic [K, N] of the shard's logits [K, N, Dp], before they become a softmax."""
        return None

    def from_softmax(self, draft: Tensor, teacher: Tensor) -> Tensor | None:
        """A statistic [K, N] of the shard's softmax."""
        return None

    def value(self, reduced: Reduced, overlap: Tensor | None) -> Tensor:
        """The loss of each row, [K, N]; ``overlap`` [K, N, 2] over all shards."""
        return reduced.cross_entropy

    def terms(self, reduced: Reduced, overlap: Tensor | None, rank: int) -> list[Tensor]:
        """What the gradient needs of the other shards, [..., N] each."""
        return []

    def gradient_(
        self, draft: Tensor, teacher: Tensor, shares: Shares, terms: list[Tensor]
    ) -> None:
        """``draft`` becomes the gradient of each row's loss on this shard's logits."""
        rescale_(draft, shares.ratio, teacher, shares.scale)


class HardCrossEntropy(SoftCrossEntropy):
    """-log q of the token that the base likes best among the draft's (``ce``)."""

    adds = True

    def from_logits(self, logits: Tensor, teacher: Tensor) -> Tensor:
        if not teacher.shape[-1]:
            return logits.new_zeros(logits.shape[:-1], dtype=torch.float32)
        best = teacher.argmax(-1).expand(logits.shape[:-1]).unsqueeze(-1)
        return logits.gather(-1, best).squeeze(-1).float()

    def value(self, reduced: Reduced, overlap: Tensor | None) -> Tensor:
        assert reduced.added is not None
        winner = reduced.teacher_max.argmax(0)  # the first of equals: the lowest id
        steps = reduced.log_z.shape[0]
        return reduced.log_z - reduced.added.gather(0, winner.expand(1, steps, -1)).squeeze(0)

    def terms(self, reduced: Reduced, overlap: Tensor | None, rank: int) -> list[Tensor]:
        return [reduced.teacher_max.argmax(0) == rank]

    def gradient_(
        self, draft: Tensor, teacher: Tensor, shares: Shares, terms: list[Tensor]
    ) -> None:
        draft.mul_(shares.ratio.unsqueeze(-1))
        if teacher.shape[-1]:
            best = teacher.argmax(-1).expand(draft.shape[:-1]).unsqueeze(-1)
            minus = -terms[0].to(draft.dtype).expand(draft.shape[:-1]).unsqueeze(-1)
            draft.scatter_add_(-1, best, minus)


class ReverseKL(SoftCrossEntropy):
    """Σ q log(q / p) (``reverse-kl``). A p below the least normal fp32 number counts as it."""

    adds = True

    def from_softmax(self, draft: Tensor, teacher: Tensor) -> Tensor:
        """The shard's own divergence: with its share r of q and t of p, the whole is
        Σ r (own + log r - log t)."""
        log_p = teacher.clamp_min(_TINY).log()
        own = [(q * (q.clamp_min(_TINY).log() - log_p)).sum(-1) for q in draft.float()]
        return torch.stack(own)

    def value(self, reduced: Reduced, overlap: Tensor | None) -> Tensor:
        assert reduced.added is not None
        log_r, log_t = reduced.draft_log_shares, reduced.teacher_log_shares
        inside = reduced.added + log_r - log_t.unsqueeze(1)
        return (log_r.exp() * inside).sum(0)

    def terms(self, reduced: Reduced, overlap: Tensor | None, rank: int) -> list[Tensor]:
        log_r, log_t = reduced.draft_log_shares[rank], reduced.teacher_log_shares[rank]
        return [log_r - log_t - self.value(reduced, overlap)]

    def gradient_(
        self, draft: Tensor, teacher: Tensor, shares: Shares, terms: list[Tensor]
    ) -> None:
        log_p = teacher.clamp_min(_TINY).log()
        for step, ratio, offset in zip(draft, shares.ratio, terms[0], strict=True):
            own = step.float()
            log_q = own.clamp_min(_TINY).log()
            step.copy_(own * ratio.unsqueeze(-1) * (log_q - log_p + offset.unsqueeze(-1)))


class TotalVariation(SoftCrossEntropy):
    """1 - alpha (``tv``), half the L1 distance of q and the base's softmax over its whole
    vocabulary.

    d alpha / d z = q (m - Σ m q) with m = 1 where q < P. Losses of alpha, and mixtures with the
    soft cross-entropy, differ from this one in two factors of a row: see :meth:`terms`.
    """

    overlaps = True

    def value(self, reduced: Reduced, overlap: Tensor | None) -> Tensor:
        assert overlap is not None
        return 1 - overlap[..., 0]

    def factors(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Of q - p and of -d alpha / d z in the gradient."""
        return torch.zeros_like(alpha), torch.ones_like(alpha)

    def terms(self, reduced: Reduced, overlap: Tensor | None, rank: int) -> list[Tensor]:
        assert overlap is not None
        return [overlap[..., 1], *self.factors(overlap[..., 0])]

    def gradient_(
        self, draft: Tensor, teacher: Tensor, shares: Shares, terms: list[Tensor]
    ) -> None:
        p = teacher * shares.scale.unsqueeze(-1)
        full = p * shares.coverage.unsqueeze(-1)
        for step, ratio, below, of_kl, of_alpha in zip(draft, shares.ratio, *terms, strict=True):
            q = step.float() * ratio.unsqueeze(-1)
            slope = q * (below.unsqueeze(-1) - (q < full).float())
            step.copy_(of_kl.unsqueeze(-1) * (q - p) + of_alpha.unsqueeze(-1) * slope)


class LogAcceptance(TotalVariation):
    """-log alpha (``lk-alpha``; arXiv 2602.23881)."""

    def value(self, reduced: Reduced, overlap: Tensor | None) -> Tensor:
        assert overlap is not None
        return -overlap[..., 0].clamp_min(_TINY).log()

    def factors(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), alpha.clamp_min(_TINY).reciprocal()


class MixedAcceptance(TotalVariation):
    """w kl + (1 - w) tv with w = exp(-decay alpha) of each row, not differentiated
    (``lk-lambda``; arXiv 2602.23881)."""

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def value(self, reduced: Reduced, overlap: Tensor | None) -> Tensor:
        assert overlap is not None
        of_kl, of_alpha = self.factors(overlap[..., 0])
        return of_kl * reduced.cross_entropy + of_alpha * (1 - overlap[..., 0])

    def factors(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        weight = (-self.decay * alpha).exp()
        return weight, 1 - weight


def overlap_statistics(draft: Tensor, teacher: Tensor, shares: Shares) -> Tensor:
    """Of this shard [K, N, 2]: Σ min(P, q), and Σ q over the tokens where q < P."""
    full = teacher * (shares.scale * shares.coverage).unsqueeze(-1)
    found = []
    for step, ratio in zip(draft, shares.ratio, strict=True):
        q = step.float() * ratio.unsqueeze(-1)
        found.append(torch.stack([torch.minimum(q, full).sum(-1), (q * (q < full)).sum(-1)], -1))
    return torch.stack(found)


def row_loss(name: str, lk_decay: float) -> SoftCrossEntropy:
    """The loss that ``--eagle-loss`` names."""
    return {
        "kl": SoftCrossEntropy(),
        "ce": HardCrossEntropy(),
        "reverse-kl": ReverseKL(),
        "tv": TotalVariation(),
        "lk-alpha": LogAcceptance(),
        "lk-lambda": MixedAcceptance(lk_decay),
    }[name]
