"""Training metrics: sums that stay on the device until an optimizer step is over.

Each micro-batch gives a vector (:func:`metric_sums`); vectors add up over micro-batches, meet the
other ranks in one all-reduce per optimizer step, and reach the host when Megatron logs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

ROWS_PER_STEP = 5
"""Sums of each step in the vector: loss, supervised rows, hits, prefix hits, smooth-L1."""


def prefix_hits(hits: Tensor, step_rows: Tensor, rows: int) -> Tensor:
    """Start rows all of whose steps 0 .. t hit, for each t: [K] fp32.

    hits [K, M] bool, False where a row is not supervised: there its prefix ends. ``step_rows``
    [K, M]: the start row, of ``rows`` on this rank, that each step judges at each target. A start
    row stays on its rank for all steps. No collective.
    """
    alive = torch.ones(rows, device=hits.device)
    counts = []
    for hit, start in zip(hits, step_rows, strict=True):
        reached = hit * alive[start]
        alive = torch.zeros_like(alive).index_add_(0, start, reached)  # unused entries add 0
        counts.append(reached.sum())
    return torch.stack(counts)


def metric_sums(sums: Tensor, prefixes: Tensor, regression: Tensor | None = None) -> Tensor:
    """The vector [ROWS_PER_STEP * K + 2] of a micro-batch: ``sums`` [3 * K + 2] of
    :func:`~megatron_eagle.loss.soft_cross_entropy.soft_cross_entropy` with the prefix hits [K]
    and EAGLE-1's smooth-L1 sums [K] behind its sums per step."""
    regression = torch.zeros_like(prefixes) if regression is None else regression
    return torch.cat([sums[:-2], prefixes, regression, sums[-2:]])


def reduce_metrics(
    sums: list[Tensor],
    steps: int,
    step_decay: float,
    regression_weight: float,
    groups: Sequence[ProcessGroup],
) -> dict[str, Tensor]:
    """One optimizer step's metrics from its micro-batches' sums; scalars on the device.

    ``loss``: Σ_t decay**t (loss_t + regression_weight smooth-L1_t); of each step, per supervised
    row of that step, ``loss_t``, ``accuracy_t`` and, with a ``regression_weight``,
    ``regression_t``; ``simulated_accepted_length`` (teacher-forced): 1 + the steps that hit before
    the first miss, per start row; ``vocab_coverage``: the base's probability inside the draft
    vocabulary; ``supervised_rows`` of step 0. One all-reduce over each of ``groups`` that has more
    than one rank (data and context parallel; pipeline).
    """
    total = torch.stack(sums).sum(0)
    for group in groups:
        if group.size() > 1:
            torch.distributed.all_reduce(total, group=group)
    per_step, coverage = total[:-2].view(ROWS_PER_STEP, steps), total[-2:]
    rows = per_step[1].clamp(min=1)
    losses, accuracies, regression = (per_step[i] / rows for i in (0, 2, 4))
    weights = torch.tensor([step_decay**t for t in range(steps)]).to(losses, non_blocking=True)
    metrics = {"loss": ((losses + regression_weight * regression) * weights).sum()}
    metrics |= {f"loss_{t}": losses[t] for t in range(steps)}
    if regression_weight:
        metrics |= {f"regression_{t}": regression[t] for t in range(steps)}
    metrics |= {f"accuracy_{t}": accuracies[t] for t in range(steps)}
    metrics["simulated_accepted_length"] = 1 + per_step[3].sum() / coverage[1].clamp(min=1)
    metrics["vocab_coverage"] = coverage[0] / coverage[1].clamp(min=1)
    metrics["supervised_rows"] = per_step[1, 0]
    return metrics
