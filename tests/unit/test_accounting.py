"""The divisor of a loss as Megatron adds it up: a 32-bit integer."""

from __future__ import annotations

import pytest
import torch

from megatron_eagle.config import EagleConfig
from megatron_eagle.objective.accounting import accounting_of
from megatron_eagle.objective.block_metrics import BlockSums

BLOCKS = {"algorithm": "dflash", "mask_token": 1, "block_size": 16}


def test_an_unroll_is_divided_by_its_tokens() -> None:
    accounting = accounting_of(EagleConfig.of(), 512)
    assert accounting.unit == 1
    sums = accounting.zeros("cpu")  # type: ignore[arg-type]
    sums[3] = 7.0  # rows of step 0
    assert float(accounting.divisor(sums)) == 7.0


@pytest.mark.parametrize("samples", [1, 4, 512, 4096])
def test_a_fraction_is_kept_as_a_fixed_point_number(samples: int) -> None:
    options = EagleConfig.of(**BLOCKS)
    accounting, blocks = accounting_of(options, samples), options.blocks()
    assert blocks.weights is not None
    largest = samples * blocks.anchors * sum(blocks.weights)
    assert largest * accounting.unit < 2**31
    one = BlockSums.zeros(options.steps, "cpu")._replace(weight=torch.tensor(largest / 3)).pack()
    kept = (accounting.divisor(one) * accounting.unit).round().to(torch.int) / accounting.unit
    assert float(kept) == pytest.approx(largest / 3, rel=1e-6)


def test_d_pace_is_divided_by_blocks() -> None:
    accounting = accounting_of(EagleConfig.of(**BLOCKS, position_weights="d-pace"), 512)
    sums = BlockSums.zeros(15, "cpu")._replace(blocks=torch.tensor(9.0), weight=torch.tensor(4.2))
    assert accounting.unit == 1 and float(accounting.divisor(sums.pack())) == 9.0
