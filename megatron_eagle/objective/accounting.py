"""What training does with a micro-batch's metric sums: divide the loss, add up, reduce once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.config import EagleConfig
from megatron_eagle.objective.block_metrics import BlockSums, divisor, reduce_block_metrics
from megatron_eagle.objective.metrics import MetricSums, reduce_metrics

_MOST = 2**30
"""Bound of a sum of divisors: Megatron adds them up as 32-bit integers."""


class Accounting(Protocol):
    """Sums of one algorithm's metrics."""

    unit: int
    """Factor of loss and divisor, which makes the divisor an integer."""

    def zeros(self, device: torch.device | int) -> Tensor:
        """Return the packed sums of no position."""
        ...

    def divisor(self, sums: Tensor) -> Tensor:
        """Return what Megatron is to divide the sum of losses by, a scalar, without ``unit``."""
        ...

    def reduce(self, sums: list[Tensor], groups: Sequence[ProcessGroup]) -> dict[str, Tensor]:
        """Reduce one optimizer step's metrics from the packed sums of its micro-batches. One
        all-reduce over each of ``groups`` that has more than one rank."""
        ...


def accounting_of(options: EagleConfig, samples: int = 1) -> Accounting:
    """Return the accounting of the run's algorithm; ``samples``: those of an optimizer step."""
    if options.spec.method.drafts_blocks:
        return _Blocks(options, samples)
    return _Unroll(options)


class _Unroll:
    """The divisor is the number of positions supervised at step 0."""

    unit = 1

    def __init__(self, options: EagleConfig) -> None:
        self.options, self.steps = options, options.train.ttt_steps

    def zeros(self, device: torch.device | int) -> Tensor:
        return MetricSums.zeros(self.steps, device).pack()

    def divisor(self, sums: Tensor) -> Tensor:
        return MetricSums.unpack(sums).rows[0]

    def reduce(self, sums: list[Tensor], groups: Sequence[ProcessGroup]) -> dict[str, Tensor]:
        options = self.options
        decay, regression = options.train.step_decay, options.regression_weight
        return reduce_metrics(sums, self.steps, decay, regression, groups)


class _Blocks:
    """The divisor is the sum of the slots' weights over the judged rows, or the number of blocks.

    The first is no integer. As a fixed-point number, in units as small as a step's sum allows, it
    is one: a power of two, which loss and divisor have in common.
    """

    def __init__(self, options: EagleConfig, samples: int) -> None:
        self.options, self.steps = options.blocks(), options.steps
        weights = self.options.weights
        largest = samples * self.options.anchors * sum(weights or (1.0,))
        self.unit = 1 if weights is None else 2 ** max(0, math.floor(math.log2(_MOST / largest)))

    def zeros(self, device: torch.device | int) -> Tensor:
        return BlockSums.zeros(self.steps, device).pack()

    def divisor(self, sums: Tensor) -> Tensor:
        return divisor(BlockSums.unpack(sums), self.options)

    def reduce(self, sums: list[Tensor], groups: Sequence[ProcessGroup]) -> dict[str, Tensor]:
        return reduce_block_metrics(sums, self.options, groups)
