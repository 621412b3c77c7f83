"""Base forwards of the next iteration, run at the end of this one: nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eagle.pipeline.plan import stage_actions
from megatron_eagle.testing.harness import run_distributed
from tests.helpers.pipeline_case import import_bases, make_case
from tests.helpers.pipeline_fixture import PipelineCase, build_pipeline
from tests.helpers.sleeping_stages import SleepingStages

MICRO_BATCHES = [5, 7, 4, 6, 5]
"""Of each iteration: their number may change, and need not be a multiple of the stages'."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_bases(tmp_path_factory.mktemp("bases"))


def train(rank: int, world: int, case: PipelineCase, ahead: bool) -> dict[str, Any]:
    """Run iterations with an evaluation after the first, one that is replayed and one that is
    skipped; return each one's results, and the kinds of its actions."""
    from megatron.core.rerun_state_machine import (
        RerunDataIterator,
        RerunMode,
        initialize_rerun_state_machine,
    )

    from megatron_eagle.pipeline.schedule import PipelineSchedule

    initialize_rerun_state_machine(mode=RerunMode.VALIDATE_RESULTS)
    model, step, groups = build_pipeline(case)
    kinds: list[str] = []
    observer = SleepingStages(0.0, 0.0)
    left = len(MICRO_BATCHES)
    schedule = PipelineSchedule(observer, lambda: ahead and left > 1)
    samples = case.micro_batches[0]
    iterator = RerunDataIterator(iter(samples))
    results = []

    def call(iterator: Any, count: int, **options: Any) -> None:
        model.zero_grad_buffer()
        observer.events.clear()
        reports = schedule(
            forward_step_func=step,
            data_iterator=iterator,
            model=[model],
            num_microbatches=count,
            pg_collection=groups,
            **options,
        )
        kinds.append("".join(kind[0] for kind, *_ in observer.events if kind != "wait"))
        gradients = [p.main_grad.clone() for p in model.module.draft.parameters()]
        results.append([*(report["eagle_sums"].detach() for report in reports), *gradients])

    for number, count in enumerate(MICRO_BATCHES):
        if number == 3:  # Megatron skips an iteration: its samples are taken and not used
            for _ in range(count):
                next(iterator)
            left -= 1
            continue
        iterator.advance()
        call(iterator, count)
        if number == 1:  # Megatron rejects a result: the same samples once more
            iterator.rewind()
            call(iterator, count)
            assert all(map(torch.equal, results[-1], results[-2]))
        with torch.no_grad():
            for parameter in model.module.draft.parameters():
                parameter -= 0.1 * parameter.main_grad
        if number == 0:
            call(iter(samples[:3]), 3, forward_only=True)
        left -= 1
    return {"results": results, "kinds": kinds, "exhausted": next(iterator, None) is None}


def end_early(rank: int, world: int, case: PipelineCase) -> list[bool]:
    """Run an iteration that believes in another, and end there: what is under way, before and
    after."""
    from megatron.core.rerun_state_machine import RerunDataIterator

    from megatron_eagle.pipeline.schedule import PipelineSchedule

    model, step, groups = build_pipeline(case)
    schedule = PipelineSchedule(another_follows=lambda: True)
    model.zero_grad_buffer()
    schedule(
        forward_step_func=step,
        data_iterator=RerunDataIterator(iter(case.micro_batches[0])),
        model=[model],
        num_microbatches=5,
        pg_collection=groups,
    )
    began = schedule._ahead is not None
    schedule.finish()
    schedule.finish()  # nothing is left
    torch.distributed.barrier()
    return [began, schedule._ahead is None]


def test_a_run_that_ends_early_ends_what_it_began(bases: Path) -> None:
    case = make_case(bases, "untied", 8, 1, pp=3, first=3)
    assert run_distributed(end_early, 3, case) == [[True, True]] * 3


def test_looking_ahead_changes_nothing(bases: Path) -> None:
    """Bit-equal losses and gradients; every sample is taken exactly once."""
    case = make_case(bases, "untied", sum(MICRO_BATCHES), 1, pp=3, first=3)
    plain = run_distributed(train, 3, case, False)
    ahead = run_distributed(train, 3, case, True)
    for stage, (without, with_it) in enumerate(zip(plain, ahead, strict=True)):
        assert without["exhausted"] and with_it["exhausted"]
        for one, other in zip(without["results"], with_it["results"], strict=True):
            assert len(one) == len(other) and all(map(torch.equal, one, other))
        first, evaluation, second, replayed, third, last = with_it["kinds"]
        assert evaluation == without["kinds"][1]
        for done, count, was_ahead, runs_ahead in (
            (first, 5, False, True),
            (second, 7, True, True),
            (replayed, 7, False, True),
            (third, 4, True, True),
            (last, 5, False, False),  # after a skipped iteration
        ):
            plan = stage_actions(stage, 3, count, was_ahead=was_ahead, runs_ahead=runs_ahead)
            assert done == "".join(action.kind[0] for action in plan)
    assert "a" in ahead[0]["kinds"][0]
