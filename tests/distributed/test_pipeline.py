"""Every pipeline stage trains: losses and gradients equal the reference's, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eagle.pipeline.plan import stage_actions
from megatron_eagle.testing.harness import run_distributed
from tests.helpers.pipeline_case import compare, import_bases, make_case, train_once
from tests.helpers.pipeline_fixture import PipelineCase, build_pipeline
from tests.helpers.sleeping_stages import SleepingStages


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_bases(tmp_path_factory.mktemp("bases"))


UNEVEN2, UNEVEN3, UNEVEN4 = (
    {"pp": 2, "first": 3}, {"pp": 3, "first": 3}, {"pp": 4, "first": 1},
)  # fmt: skip
SP = {"tp": 2, "sequence_parallel": True}
DO = {"distributed_optimizer": True}
slow = pytest.mark.slow
CASES = [
    pytest.param(2, "tied", 5, 1, UNEVEN2, id="pp2-uneven-micro-batches"),
    pytest.param(3, "untied", 5, 1, UNEVEN3, id="pp3-untied"),
    pytest.param(4, "untied", 3, 1, {**UNEVEN2, **SP}, id="tp2-sp-pp2-untied"),
    pytest.param(2, "untied", 2, 1, UNEVEN2, id="pp2-untied-one-each", marks=slow),
    pytest.param(3, "tied", 7, 1, UNEVEN3, id="pp3-tied", marks=slow),
    pytest.param(4, "tied", 4, 1, UNEVEN4, id="pp4-tied", marks=slow),
    pytest.param(4, "untied", 9, 1, UNEVEN4, id="pp4-untied", marks=slow),
    pytest.param(4, "tied", 3, 1, {**UNEVEN2, "cp": 2}, id="cp2-pp2", marks=slow),
    pytest.param(4, "tied", 4, 2, {**UNEVEN2, **DO}, id="pp2-dp2-do"),
    pytest.param(4, "tied", 3, 2, UNEVEN2, id="pp2-dp2", marks=slow),
    pytest.param(4, "tied", 3, 1, {**UNEVEN2, "tp": 2}, id="tp2-pp2", marks=slow),
]


@pytest.mark.parametrize(("world", "name", "micro_batches", "dp", "layout"), CASES)
def test_equals_reference(
    world: int, name: str, micro_batches: int, dp: int, layout: dict[str, Any], bases: Path
) -> None:
    case = make_case(bases, name, micro_batches, dp, **layout)
    results = [result for (result,) in run_distributed(train_once, world, [case])]
    compare(case, results)
    for result in results:
        owned = len(range(result["stage"], micro_batches, case.pp))
        assert result["micro_batches"] == owned
        assert result["shared"] == {result["stage"] > 0}, "the norm counts the first stage alone"


def record_events(rank: int, world: int, case: PipelineCase, base: float, draft: float) -> Any:
    """Record the events of an iteration between two others."""
    from megatron.core.rerun_state_machine import RerunDataIterator

    from megatron_eagle.pipeline.schedule import PipelineSchedule

    model, step, groups = build_pipeline(case)
    observer, recorded = SleepingStages(base, draft), []
    schedule = PipelineSchedule(observer, lambda: len(recorded) < 2)
    share = case.micro_batches[0]
    iterator = RerunDataIterator(iter(3 * share))
    for _ in range(3):
        observer.events.clear()
        torch.distributed.barrier()
        schedule(
            forward_step_func=step,
            data_iterator=iterator,
            model=[model],
            num_microbatches=len(share),
            pg_collection=groups,
        )
        recorded.append(list(observer.events))
    return recorded[1]


def test_no_stage_waits_for_another(bases: Path) -> None:
    """Two balanced stages, six micro-batches: work that sleeps, so that it needs no core."""
    base, draft, count = 0.15, 0.45, 6
    case = make_case(bases, "tied", count, 1, pp=2, first=3)
    stages = run_distributed(record_events, 2, case, base, draft)
    for stage, events in enumerate(stages):
        done = [(kind, m) for kind, m, _, _ in events if kind != "wait"]
        assert done == stage_actions(stage, 2, count, was_ahead=True, runs_ahead=True)
        begin, end = events[0][2], events[-1][3]
        busy = sum(stop - start for kind, _, start, stop in events if kind != "wait")
        assert busy / (end - begin) > 0.9, f"stage {stage} was busy {busy / (end - begin):.0%}"
        longest = max(stop - start for kind, _, start, stop in events if kind == "wait")
        assert longest < base, f"stage {stage} waited {longest:.2f} s, there is no fill"
