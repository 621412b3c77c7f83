"""The loss adds the head's gradient to Megatron's fp32 buffer, exactly, however it is reduced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_eagle.testing.harness import run_distributed
from tests.helpers.pipeline_case import compare, import_bases, make_case, train_once
from tests.helpers.pipeline_fixture import PipelineCase, build_pipeline


def rates(rank: int, world: int, case: PipelineCase) -> dict[str, float]:
    """The learning rate of each of the draft's parameters with ``--decoupled-lr 5e-4``."""
    from megatron.core.optimizer import (
        OptimizerConfig,
        get_megatron_optimizer,
        get_standard_config_overrides,
    )

    model, _, _ = build_pipeline(case)
    config = OptimizerConfig(optimizer="adam", lr=1e-4, min_lr=0.0, decoupled_lr=5e-4)
    optimizer = get_megatron_optimizer(
        config, [model], config_overrides=get_standard_config_overrides(config)
    )
    by_parameter = {
        id(parameter): group["max_lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {name: by_parameter[id(p)] for name, p in model.module.draft.named_parameters()}


def test_the_head_has_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    case = make_case(import_bases(tmp_path), "tied", 1, 1)
    (found,) = run_distributed(rates, 1, case)
    assert found.pop("lm_head.weight") == 5e-4
    assert set(found.values()) == {1e-4}


KEPT = {"tp": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(2, {}, id="dp2-at-once"),
        pytest.param(4, KEPT, id="tp2-sp-dp2-kept", marks=pytest.mark.slow),
    ],
)
def test_equals_reference(world: int, layout: dict[str, Any], tmp_path: Path) -> None:
    """Three micro-batches on each of two replicas, without overlap, and with overlapped reduction
    into a distributed optimizer's shards."""
    bases = import_bases(tmp_path)
    cases = [
        make_case(bases, "tied", 3, 2, distributed_optimizer=shards, **layout)
        for shards in (False, True)
    ]
    results = run_distributed(train_once, world, cases)
    for case, by_rank in zip(cases, zip(*results, strict=True), strict=True):
        compare(case, list(by_rank))
        for result in by_rank:
            assert result["added_by_loss"] == ["lm_head.weight"]
