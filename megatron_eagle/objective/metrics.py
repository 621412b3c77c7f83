"""Sum training metrics on the device until an optimizer step is over, then reduce them once.

Each micro-batch gives a vector, a packed :class:`MetricSums`; vectors add up over micro-batches,
meet the other ranks in one all-reduce per optimizer step, and reach the host when Megatron logs.

Shape letters: K TTT steps, M target positions of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.loss.statistics import LossSums


class MetricSums(NamedTuple):
    """Sums over the supervised positions of one micro-batch or more: fp32 [K], or a scalar.

    Between micro-batches and ranks they travel as one vector [5 K + 2], see :meth:`pack`.
    """

    loss: Tensor
    """[K]: the loss, not weighted by step."""
    rows: Tensor
    """[K]: supervised positions."""
    hits: Tensor
    """[K]: positions whose draft argmax is the base's."""
    prefix_hits: Tensor
    """[K]: positions that hit at this step and at all steps before, see :func:`prefix_hits`."""
    regression: Tensor
    """[K]: EAGLE-1's smooth-L1 loss of the hidden."""
    coverage: Tensor
    """Scalar: the base's probability inside the draft vocabulary, over ``coverage_rows``."""
    coverage_rows: Tensor
    """Scalar: target positions of TTT step 0."""

    @classmethod
    def zeros(cls, steps: int, device: torch.device | int) -> Self:
        """Return the sums of no position."""
        return cls.unpack(torch.zeros(5 * steps + 2, device=device))

    def pack(self) -> Tensor:
        """Return the vector [5 K + 2]."""
        return torch.cat([torch.stack(self[:5]).flatten(), torch.stack(self[5:])])

    @classmethod
    def unpack(cls, packed: Tensor) -> Self:
        """Return the fields of a vector [5 K + 2], as views."""
        return cls(*packed[:-2].view(5, -1), *packed[-2:])


def prefix_hits(hits: Tensor, step_rows: Tensor, rows: int) -> Tensor:
    """Count the start rows all of whose steps 0 .. t hit, for each t: [K] fp32.

    hits [K, M] bool, False where a row is not supervised: there its prefix ends. ``step_rows``
    [K, M]: the start row, of the ``rows`` live ones of this rank, that each step judges at each
    target. A start row stays on its rank for all steps. No collective.
    """
    alive = torch.ones(rows, device=hits.device)
    counts = []
    for hit, start in zip(hits, step_rows, strict=True):
        reached = hit * alive[start]
        alive = torch.zeros_like(alive).index_add_(0, start, reached)  # unused entries add 0
        counts.append(reached.sum())
    return torch.stack(counts)


def metric_sums(sums: LossSums, prefixes: Tensor, regression: Tensor | None = None) -> Tensor:
    """Return the packed :class:`MetricSums` [5 K + 2] of a micro-batch.

    ``sums`` come from :func:`~megatron_eagle.loss.soft_cross_entropy.soft_cross_entropy`,
    ``prefixes`` [K] from :func:`prefix_hits`; ``regression`` [K] is EAGLE-1's smooth-L1.
    """
    return MetricSums(
        loss=sums.loss,
        rows=sums.rows,
        hits=sums.hits,
        prefix_hits=prefixes,
        regression=torch.zeros_like(prefixes) if regression is None else regression,
        coverage=sums.coverage,
        coverage_rows=sums.coverage_rows,
    ).pack()


def add_up(sums: Sequence[Tensor], groups: Sequence[ProcessGroup]) -> Tensor:
    """Add up the packed sums of an optimizer step's micro-batches, on all ranks of ``groups``.

    One all-reduce over each of ``groups`` that has more than one rank.
    """
    packed = torch.stack(list(sums)).sum(0)
    for group in groups:
        if group.size() > 1:
            torch.distributed.all_reduce(packed, group=group)
    return packed


def reduce_metrics(
    sums: list[Tensor],
    steps: int,
    step_decay: float,
    regression_weight: float,
    groups: Sequence[ProcessGroup],
) -> dict[str, Tensor]:
    """Reduce one optimizer step's metrics from the packed sums of its micro-batches; returns
    scalars on the device.

    ``loss``: Σ_t decay**t (loss_t + regression_weight smooth-L1_t); of each step, per supervised
    row of that step, ``loss_t``, ``accuracy_t`` and, with a ``regression_weight``,
    ``regression_t``; ``simulated_accepted_length`` (teacher-forced): 1 + the steps that hit before
    the first miss, per start row; ``vocab_coverage``: the base's probability inside the draft
    vocabulary; ``supervised_rows`` of step 0. One all-reduce over each of ``groups`` that has more
    than one rank (data and context parallel; pipeline).
    """
    total = MetricSums.unpack(add_up(sums, groups))
    rows, first_rows = total.rows.clamp(min=1), total.coverage_rows.clamp(min=1)
    losses, accuracies, regression = (
        field / rows for field in (total.loss, total.hits, total.regression)
    )
    weights = torch.tensor([step_decay**t for t in range(steps)]).to(losses, non_blocking=True)
    metrics = {"loss": ((losses + regression_weight * regression) * weights).sum()}
    metrics |= {f"loss_{t}": losses[t] for t in range(steps)}
    if regression_weight:
        metrics |= {f"regression_{t}": regression[t] for t in range(steps)}
    metrics |= {f"accuracy_{t}": accuracies[t] for t in range(steps)}
    metrics["simulated_accepted_length"] = 1 + total.prefix_hits.sum() / first_rows
    metrics["vocab_coverage"] = total.coverage / first_rows
    metrics["supervised_rows"] = total.rows[0]
    return metrics
