"""Training metrics: sums that stay on the device until an optimizer step is over.

Each micro-batch gives the vector of :func:`megatron_eagle.parallel.soft_cross_entropy`, EAGLE-1
with K regression sums more (:func:`with_regression`); vectors add up over micro-batches, meet the
other ranks in one all-reduce per optimizer step, and reach the host when Megatron logs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def with_regression(sums: Tensor, regression: Tensor) -> Tensor:
    """``sums`` with the smooth-L1 sums [K] of each step behind the other sums per step."""
    return torch.cat([sums[:-2], regression, sums[-2:]])


def reduce_metrics(
    sums: list[Tensor], steps: int, step_decay: float, regression_weight: float, group: ProcessGroup
) -> dict[str, Tensor]:
    """One optimizer step's metrics from its micro-batches' sums; scalars on the device.

    ``loss``: Σ_t decay**t (CE_t + regression_weight smooth-L1_t); of each step, per supervised row
    of that step, ``loss_t`` (CE), ``accuracy_t`` and for EAGLE-1 ``regression_t``;
    ``vocab_coverage``: the base's probability inside the draft vocabulary; ``supervised_rows`` of
    step 0. One all-reduce over ``group`` (data and context parallel).
    """
    total = torch.stack(sums).sum(0)
    if group.size() > 1:
        torch.distributed.all_reduce(total, group=group)
    per_step, coverage = total[:-2].view(-1, steps), total[-2:]
    rows = per_step[1].clamp(min=1)
    losses, accuracies = per_step[0] / rows, per_step[2] / rows
    weights = torch.tensor([step_decay**t for t in range(steps)]).to(losses, non_blocking=True)
    metrics = {"loss": (losses * weights).sum()}
    metrics |= {f"loss_{t}": losses[t] for t in range(steps)}
    for regression in per_step[3:] / rows:
        metrics["loss"] += regression_weight * (regression * weights).sum()
        metrics |= {f"regression_{t}": regression[t] for t in range(steps)}
    metrics |= {f"accuracy_{t}": accuracies[t] for t in range(steps)}
    metrics["vocab_coverage"] = coverage[0] / coverage[1].clamp(min=1)
    metrics["supervised_rows"] = per_step[1, 0]
    return metrics
