"""What benchmarks/block_step.py measures is one problem: ours and speculators' training steps."""

from __future__ import annotations

import importlib.util

import pytest
from torch import Tensor

from benchmarks.block_problem import BlockProblem
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.readers import library_readers

if importlib.util.find_spec("specforge") is None:
    pytest.skip("run by `make test-readers`", allow_module_level=True)
library_readers.install()
TINY = {"hidden": 32, "intermediate": 64, "heads": 4, "kv_heads": 2, "vocab": 90, "seq": 64,
        "block": 4, "anchors": 8, "rank": 6}  # fmt: skip
COMMON = ("fc.weight", "hidden_norm.weight", "norm.weight")


def our_steps(rank: int, world: int) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and the gradients of COMMON and the Markov head, of DFlash and DSpark."""
    megatron_parallel()
    from benchmarks.block_step import build

    found = []
    for next_token in (False, True):
        forward, _ = build(BlockProblem(next_token=next_token, **TINY))
        loss = forward()
        loss.backward()
        parameters = dict(forward.model.draft.named_parameters())
        names = [*COMMON, *(["markov.w1.weight", "markov.w2.weight"] if next_token else [])]
        found.append((loss.item(), {name: parameters[name].grad for name in names}))
    return found


def test_losses_and_gradients_agree_with_speculators() -> None:
    from benchmarks.peers import speculators_blocks

    (ours,) = run_distributed(our_steps, 1)
    assert len(ours) == 2
    for next_token, (loss, gradients) in zip((False, True), ours, strict=True):
        problem = BlockProblem(next_token=next_token, **TINY)
        step, _ = speculators_blocks.build(problem)
        theirs = step()
        theirs.backward()
        # The library norms the base's final hidden state once more, with an epsilon of 1e-5.
        assert problem.in_our_words(theirs.item()) == pytest.approx(loss, rel=1e-5)
        scale = problem.in_our_words(1.0) - problem.in_our_words(0.0)
        parameters = dict(step.model.named_parameters())
        for name, gradient in gradients.items():
            other = parameters[name.replace("markov.w", "markov_head.markov_w")].grad
            rows = gradient[: len(other)]  # a vocabulary's shard may be padded
            difference = (rows - scale * other).norm()
            assert 0 < difference < 1e-4 * rows.norm(), name
