"""Metrics of one optimizer step: one collective, per-row means over all ranks and micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_eagle.testing.collectives import CollectiveCounter
from megatron_eagle.testing.harness import run_distributed

STEPS = 2


def sums(losses: list[float], rows: list[int], hits: list[int], coverage: float) -> torch.Tensor:
    """A micro-batch's vector; all hits of step 1 are those of start rows that hit before, and the
    smooth-L1 is half the loss. Coverage is summed over the rows of step 0."""
    from megatron_eagle.loss.statistics import LossSums
    from megatron_eagle.objective.metrics import MetricSums, metric_sums

    loss_sums = LossSums(
        *(torch.tensor(values, dtype=torch.float32) for values in (losses, rows, hits)),
        torch.tensor(coverage),
        torch.tensor(float(rows[0])),
    )
    packed = metric_sums(loss_sums, torch.tensor(hits).float(), torch.tensor(losses) / 2)
    assert packed.shape == MetricSums.zeros(STEPS, torch.device("cpu")).pack().shape
    return packed


def reduce_on_rank(rank: int, world: int) -> dict[str, Any]:
    from megatron_eagle.objective.metrics import reduce_metrics

    micro_batches = [
        [sums([8.0, 6.0], [4, 3], [2, 0], 3.0), sums([1.0, 1.0], [1, 1], [1, 1], 0.5)],
        [sums([0.0, 0.0], [0, 0], [0, 0], 0.0), sums([11.0, 7.0], [5, 3], [1, 1], 4.5)],
    ]
    with CollectiveCounter() as counter:
        groups = [torch.distributed.group.WORLD]
        found = reduce_metrics(micro_batches[rank], STEPS, 0.5, 3.0, groups)
    return {"calls": dict(counter.calls), **{key: float(value) for key, value in found.items()}}


def test_metrics_are_exact_means_and_take_one_all_reduce() -> None:
    for found in run_distributed(reduce_on_rank, 2):
        assert found.pop("calls") == {"allreduce": 1}
        assert found == pytest.approx(
            {
                "loss_0": 20 / 10,
                "loss_1": 14 / 7,
                "loss": (2.0 + 3 * 1.0) + 0.5 * (2.0 + 3 * 1.0),
                "regression_0": 1.0,
                "regression_1": 1.0,
                "accuracy_0": 4 / 10,
                "accuracy_1": 2 / 7,
                "simulated_accepted_length": 1 + (4 + 2) / 10,
                "vocab_coverage": 8.0 / 10,
                "supervised_rows": 10,
            }
        )
