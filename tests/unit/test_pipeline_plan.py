"""The order of a pipeline stage's work."""

from __future__ import annotations

import pytest

from megatron_eagle.pipeline.plan import Action, owner_of, stage_actions


@pytest.mark.parametrize("slack", [0, 1, 3])
@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 4), (2, 2), (2, 5), (3, 7), (4, 16)])
def test_every_micro_batch_runs_once(stages: int, micro_batches: int, slack: int) -> None:
    trained = []
    for stage in range(stages):
        actions = stage_actions(stage, stages, micro_batches, slack)
        base = [a.micro_batch for a in actions if a.kind == "base"]
        own = [a.micro_batch for a in actions if a.kind == "draft"]
        assert base == list(range(micro_batches)), "messages between two stages keep their order"
        assert own == sorted(own) and all(owner_of(m, stages) == stage for m in own)
        for m in own:
            assert actions.index(Action("base", m)) < actions.index(Action("draft", m))
        trained += own
    assert sorted(trained) == list(range(micro_batches))


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 2), (2, 5), (3, 7), (4, 4), (4, 16)])
def test_forwards_run_ahead_are_those_that_the_next_iteration_leaves_out(
    stages: int, micro_batches: int
) -> None:
    for stage in range(stages):
        plain = stage_actions(stage, stages, micro_batches)
        running_ahead = stage_actions(stage, stages, micro_batches, runs_ahead=True)
        ahead = [a.micro_batch for a in running_ahead if a.kind == "ahead"]
        assert ahead == list(range(stages - 1 - stage)), "received before the iteration ends"
        was_ahead = stage_actions(stage, stages, micro_batches, was_ahead=True)
        left = [a.micro_batch for a in was_ahead if a.kind == "base"]
        assert ahead + left == list(range(micro_batches))
        for actions in (running_ahead, was_ahead):
            assert [a for a in actions if a.kind == "draft"] == [
                a for a in plain if a.kind == "draft"
            ]
            for m in range(stage, micro_batches, stages):
                if ("base", m) in actions:
                    assert actions.index(("base", m)) < actions.index(("draft", m))


def test_every_stage_runs_one_draft_step_per_round_at_the_same_point() -> None:
    kinds = ["".join(a.kind[0] for a in stage_actions(stage, 4, 12)) for stage in range(4)]
    assert kinds == ["bbbbbdbbbbdbbbd"] * 4
    kinds = [
        "".join(a.kind[0] for a in stage_actions(stage, 4, 8, was_ahead=True, runs_ahead=True))
        for stage in range(4)
    ]
    assert kinds == ["bbdbbbadaa", "bbbdbbbada", "bbbbdbbbad", "bbbbbdbbbd"]
