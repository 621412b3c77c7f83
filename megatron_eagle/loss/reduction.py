"""Combine the statistics of all vocabulary shards into losses, accuracies and log Z.

Shape letters: T ranks (shards), K TTT steps, N target positions. q is the draft's softmax, p the
base's over the draft vocabulary; Z normalises q. A shard's *mass* is the probability that q or p
gives its tokens together: a softmax over the shard, times the mass, is the shard's part of q or p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.kernels.choice import with_kernel
from megatron_eagle.loss.statistics import LossSums, ShardStats, TeacherStats, gather_statistics
from megatron_eagle.parallel.vocab import combine_argmax, combine_log_sum_exp


class ShardMass(NamedTuple):
    """Factors that make this shard's softmaxes parts of the whole: q = softmax * ``draft``,
    p = softmax * ``teacher``, and p * ``coverage`` is the base's over its whole vocabulary."""

    draft: Tensor
    """[K, N]: mass of this shard under q."""
    teacher: Tensor
    """[N]: mass of this shard under p."""
    coverage: Tensor
    """[N]: the base's probability inside the draft vocabulary."""

    def take(self, positions: slice) -> ShardMass:
        """Return the masses at some of the N positions."""
        return ShardMass(*(field[..., positions] for field in self))


class Overlap(NamedTuple):
    """How q and the base's whole softmax P = p * coverage overlap: [K, N] each, over all shards."""

    alpha: Tensor
    """Σ min(P, q): the probability that a verifier accepts a token drafted from q."""
    below: Tensor
    """Σ q over the tokens where q < P."""


@dataclass(frozen=True)
class ReducedStats:
    """Statistics reduced over the T vocabulary shards; the fields of one shape [T, ...] stay per
    shard, for losses other than the soft cross-entropy. ``rank``: this rank's place among them."""

    rank: int
    cross_entropy: Tensor
    """[K, N]: -Σ p log q."""
    log_z: Tensor
    """[K, N]."""
    hit: Tensor
    """[K, N] bool: the draft's argmax is the base's over its whole vocabulary."""
    teacher_log_z: Tensor
    """[N]: over the draft vocabulary."""
    teacher_argmax: Tensor
    """[N] int64: over the base's whole vocabulary."""
    coverage: Tensor
    """[N]: the base's probability inside the draft vocabulary."""
    teacher_max: Tensor
    """[T, N]: the base's largest logit in each draft shard."""
    extra: Tensor | None
    """[T, K, N]: the loss's own statistic."""
    draft_log_mass: Tensor
    """[T, K, N]: logarithm of each shard's mass under q."""
    teacher_log_mass: Tensor
    """[T, N]: logarithm of each shard's mass under p."""
    overlap: Overlap | None = None
    """For losses that need it, after a second reduction."""

    def sums(self, loss: Tensor, mask: Tensor, first_step: Tensor) -> LossSums:
        """Sum ``loss`` [K, N] and the hits over the positions of ``mask`` [K, N] bool, and the
        coverage over ``first_step`` [N] bool, the targets of step 0 (a context-parallel rank also
        holds targets whose step 0 is another rank's)."""
        return LossSums(
            loss=(loss * mask).sum(-1),
            rows=mask.sum(-1).float(),
            hits=(self.hit & mask).sum(-1).float(),
            coverage=(self.coverage * first_step).sum(),
            coverage_rows=first_step.sum().float(),
        )


def reduce_shards(draft: ShardStats, teacher: TeacherStats, group: ProcessGroup) -> ReducedStats:
    """Reduce the statistics of this rank's shard, [K, N] and [N], with all others.

    One all-gather over ``group``, none for a single rank. Not differentiable.
    """
    rank = 0 if group.size() == 1 else group.rank()
    return reduce_gathered(*gather_statistics(draft, teacher, group), rank)


def reduce_gathered(drafts: ShardStats, teachers: TeacherStats, rank: int) -> ReducedStats:
    """Reduce the statistics of all shards, [T, K, N] and [T, N]. No collective."""
    log_z = combine_log_sum_exp(drafts.max, drafts.sum_exp)
    teacher_log_z = combine_log_sum_exp(teachers.max, teachers.sum_exp)
    full_log_z = combine_log_sum_exp(teachers.full_max, teachers.full_sum_exp)
    teacher_argmax = combine_argmax(teachers.full_max, teachers.full_argmax)
    teacher_log_mass = _log_mass(teachers.max, teachers.sum_exp, teacher_log_z)
    return ReducedStats(
        rank=rank,
        cross_entropy=log_z - (drafts.dot * teacher_log_mass.exp().unsqueeze(1)).sum(0),
        log_z=log_z,
        hit=combine_argmax(drafts.max, drafts.argmax) == teacher_argmax,
        teacher_log_z=teacher_log_z,
        teacher_argmax=teacher_argmax,
        coverage=(teacher_log_z - full_log_z).exp(),
        teacher_max=teachers.max,
        extra=drafts.extra,
        draft_log_mass=_log_mass(drafts.max, drafts.sum_exp, log_z),
        teacher_log_mass=teacher_log_mass,
    )


def shard_mass(draft: ShardStats, teacher: TeacherStats, reduced: ReducedStats) -> ShardMass:
    """Return the masses of this rank's shard from its own statistics, [K, N] and [N]."""
    return ShardMass(
        draft=draft.sum_exp * (draft.max - reduced.log_z).exp(),
        teacher=teacher.sum_exp * (teacher.max - reduced.teacher_log_z).exp(),
        coverage=reduced.coverage,
    )


def shard_overlap(draft: Tensor, teacher: Tensor, mass: ShardMass) -> Tensor:
    """Return this shard's part of :class:`Overlap`, [2, K, N], from its softmaxes ``draft``
    [K, N, Dp] and ``teacher`` [N, Dp]; the sum over all shards is the whole. No collective."""
    return _overlap(draft, teacher, mass.draft, mass.teacher, mass.coverage)


@with_kernel("megatron_eagle.kernels.acceptance:overlap")
def _overlap(
    draft: Tensor, teacher: Tensor, mass: Tensor, teacher_mass: Tensor, coverage: Tensor
) -> Tensor:
    full = teacher * (teacher_mass * coverage).unsqueeze(-1)
    parts = []
    for softmax, step_mass in zip(draft, mass, strict=True):
        q = softmax.float() * step_mass.unsqueeze(-1)
        # Compared in fp32: a product with booleans takes five times as long on a CPU.
        below = torch.lt(q, full, out=torch.empty_like(q)).mul_(q)
        parts.append(torch.stack([torch.minimum(q, full).sum(-1), below.sum(-1)]))
    return torch.stack(parts, dim=1)


def _log_mass(maxima: Tensor, sums: Tensor, log_z: Tensor) -> Tensor:
    """Return log(sum) + max - log Z; finite for an empty shard too, whose mass is then 0 in fp32
    (any other shard's own maximum adds 1 to its sum)."""
    return sums.clamp_min(1.0).log() + maxima - log_z
