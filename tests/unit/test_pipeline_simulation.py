"""The simulated schedule: what it must be by hand, and that every stage keeps busy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from pipeline_schedule import SHAPES, Shape, last_stage_plan, measure, simulate

from megatron_eagle.pipeline.plan import stage_actions


def test_one_stage_is_the_sum_of_its_work() -> None:
    shape = SHAPES[0]
    for plan in (stage_actions(0, 1, 5), last_stage_plan(0, 1, 5)):
        ends = simulate(shape, [[plan], [plan]], 3, True)
        assert ends == pytest.approx([5 * (shape.base + shape.draft(3)) * i for i in (1, 2)])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("stages", [4, 8, 16])
@pytest.mark.parametrize("steps", [3, 7])
def test_only_the_first_iteration_fills_the_pipeline(shape: Shape, stages: int, steps: int) -> None:
    """It loses the forwards until its first micro-batch reaches the last stage, and one round's
    slack at the end; later ones lose little more than messages."""
    row = measure(shape, steps, stages, 4 * stages)
    base = shape.base / stages
    work = 4 * (shape.base + shape.draft(steps))
    lost = work / row.first - work
    assert lost < (stages - 1) * (base + shape.message(1)) + 4 * base
    assert row.every_stage > 0.97 > 0.93 > row.first > row.last_stage
