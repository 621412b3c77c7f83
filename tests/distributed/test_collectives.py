"""How many collectives a micro-batch costs, and how many bytes the loss sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_eagle.testing.collectives import CollectiveCounter
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.draft_fixture import Case, build_model
from tests.helpers.reference_case import make_case


def count_micro_batch(rank: int, world: int, case: Case) -> dict[str, Any]:
    groups = megatron_parallel(tp=world // case.cp, cp=case.cp)
    from megatron_eagle.objective.batch import EagleBatch

    model = build_model(case)
    context = (groups.cp.rank(), case.cp)
    batch = EagleBatch.build(
        case.tokens, case.loss_mask, case.config.ttt_steps, multiple=world, context=context,
        parts=world if case.sequence_parallel else 1,
    )  # fmt: skip
    model(batch)  # the teacher's rows are fetched once, at the first micro-batch
    with CollectiveCounter() as forward:
        loss, _ = model(batch)
    with CollectiveCounter() as backward:
        loss.backward()
    return {
        "forward": dict(forward.calls),
        "backward": dict(backward.calls),
        "gathered": forward.gathered,
        "targets": batch.target_rows.numel(),
    }


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_tensor_parallelism_costs_the_collectives_that_are_documented(steps: int) -> None:
    case, _ = make_case(ttt_steps=steps)
    for found in run_distributed(count_micro_batch, 2, case):
        # Embedding, then attention output and MLP output of every step.
        # Gathers: fc, and the loss of all steps together.
        assert found["forward"] == {"allreduce": 1 + 2 * steps, "allgather_base": 2}
        # The heads of all steps in one, then the qkv and fc1 inputs of every step.
        assert found["backward"] == {"allreduce": 1 + 2 * steps}
        rows = found["targets"]
        assert found["gathered"][-1] == rows * (4 * steps + 5), "16 bytes a row and step"


def test_p_eagle_is_one_pass_of_the_layers() -> None:
    case, _ = make_case(mask_token=7, ttt_steps=5)
    for found in run_distributed(count_micro_batch, 2, case):
        # As with one step, and fc once more for the mask hidden (backward: its gradient).
        assert found["forward"] == {"allreduce": 1 + 2, "allgather_base": 3}
        assert found["backward"] == {"allreduce": 1 + 2 + 1}


def test_sequence_parallelism_costs_the_collectives_that_are_documented() -> None:
    case, _ = make_case(sequence_parallel=True)
    for found in run_distributed(count_micro_batch, 2, case):
        # Gathers: the final hidden, qkv and fc1 input of every step, the live rows' residual, all
        # heads, the loss.
        assert found["forward"] == {"reduce_scatter_base": 1 + 2 * 3, "allgather_base": 2 * 3 + 4}
        assert found["gathered"][-1] == found["targets"] * (4 * 3 + 5)


def test_context_parallelism_costs_the_collectives_that_are_documented() -> None:
    case, _ = make_case(cp=2, ttt_steps=5)
    for found in run_distributed(count_micro_batch, 2, case):
        # The final hidden's halo; keys and values of the trunk, once for all steps.
        assert found["forward"] == {"allgather_base": 2}
        assert found["backward"] == {"reduce_scatter_base": 1}


class GivenTeacher:
    """Fixed softmaxes and statistics of 7 rows."""

    full_columns = draft_columns = 5

    def __init__(self) -> None:
        self.softmax, self.statistics = torch.rand(7, 5).softmax(-1), torch.rand(5, 7) + 1

    def rows(self, chunk: slice) -> tuple[torch.Tensor, Any]:
        from megatron_eagle.loss.statistics import TeacherStats

        return self.softmax[chunk].clone(), TeacherStats(*self.statistics[:, chunk])


def count_losses(rank: int, world: int) -> dict[str, Any]:
    """Collectives of every loss, forward and backward, all chunks kept."""
    from megatron_eagle.loss.registry import ROW_LOSSES

    return {name: count_loss_only(rank, world, 2, 1 << 20, name) for name in ROW_LOSSES}


def test_losses_of_the_acceptance_are_one_collective_more() -> None:
    for found in run_distributed(count_losses, 2):
        for name, counts in found.items():
            more = {} if name in ("kl", "ce", "reverse-kl") else {"allreduce": 1}
            assert counts["forward"] == {"allgather_base": 1, **more}, name
            assert counts["backward"] == {}, name
            extra = 1 if name in ("ce", "reverse-kl") else 0
            assert counts["sent"] == [3 * 7 * (4 + extra) + 7 * 5], name


def count_loss_only(
    rank: int, world: int, chunk_rows: int, budget: int, name: str = "kl"
) -> dict[str, Any]:
    from megatron_eagle.loss.inputs import Budgets, LossRows
    from megatron_eagle.loss.registry import row_loss
    from megatron_eagle.loss.soft_cross_entropy import soft_cross_entropy

    torch.manual_seed(rank)
    hidden, weight = torch.randn(3, 7, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    mask, steps = torch.ones(3, 7, dtype=torch.bool), torch.ones(3)
    rows = LossRows(mask, steps, torch.arange(5), None)
    group = torch.distributed.group.WORLD
    assert group is not None
    chunk_bytes = 4 * chunk_rows * (3 * 5 + GivenTeacher.full_columns)
    budgets = Budgets(1 << 20, budget, chunk_bytes)
    with CollectiveCounter() as forward:
        loss, *_ = soft_cross_entropy(
            hidden, weight, GivenTeacher(), rows, group, budgets, row_loss(name, 3.0)
        )
    with CollectiveCounter() as backward:
        loss.backward()
    return {
        "forward": dict(forward.calls),
        "backward": dict(backward.calls),
        "sent": forward.gathered,
        "gradients": (hidden.grad, weight.grad),
    }


def test_the_loss_is_one_collective_and_its_backward_none() -> None:
    """However many chunks there are, as long as they may be kept."""
    for found in run_distributed(count_loss_only, 2, 2, 1 << 20):
        assert found["forward"] == {"allgather_base": 1} and found["backward"] == {}
        assert found["sent"] == [3 * 7 * 4 + 7 * 5], "16 bytes a row and step"


def test_beyond_the_budget_each_chunk_is_one_collective_and_nothing_else_changes() -> None:
    kept = run_distributed(count_loss_only, 2, 2, 4 * 7 * 5)
    at_once = run_distributed(count_loss_only, 2, 2, 4 * 7 * 5 - 1)
    for one, other in zip(kept, at_once, strict=True):
        assert one["forward"] == {"allgather_base": 1}
        assert other["forward"] == {"allgather_base": 4} and other["backward"] == {}
        assert sum(other["sent"]) == one["sent"][0], "the same bytes in all"
        torch.testing.assert_close(other["gradients"], one["gradients"], rtol=1e-5, atol=1e-6)


def test_the_flag_sets_the_rows_of_a_chunk() -> None:
    vocab = 16384
    case, _ = make_case(
        vocab_size=vocab, draft_vocab_size=vocab, logits_budget_mib=0, loss_chunk_mib=1
    )
    for found in run_distributed(count_micro_batch, 2, case):
        rows = (1 << 20) // (4 * (3 + 1) * vocab // 2)
        chunks = -(-found["targets"] // rows)
        assert chunks > 2 and found["forward"]["allgather_base"] == 1 + chunks
