"""What benchmarks/block_step.py measures is one problem: our training step and the peers'."""

from __future__ import annotations

import importlib
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
PROBLEMS = [
    BlockProblem(next_token=next_token, loss=loss, **TINY)
    for next_token, loss in ((False, "kl"), (True, "kl"), (False, "ce"), (True, "ce-l1"))
]
COMMON = ("fc.weight", "hidden_norm.weight", "norm.weight")


def our_steps(rank: int, world: int) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and the gradients of COMMON and the Markov head, of each problem."""
    megatron_parallel()
    from benchmarks.block_step import build

    found = []
    for problem in PROBLEMS:
        forward, _ = build(problem)
        loss = forward()
        loss.backward()
        parameters = dict(forward.model.draft.named_parameters())
        markov = ["markov.w1.weight", "markov.w2.weight"] if problem.next_token else []
        found.append((loss.item(), {name: parameters[name].grad for name in [*COMMON, *markov]}))
    return found


def compare(problem: BlockProblem, peer: str, loss: float, gradients: dict[str, Tensor]) -> None:
    """Run the peer's step, and assert that its loss and gradients are ours."""
    step, _ = importlib.import_module(f"benchmarks.peers.{peer}").build(problem)
    theirs = step()
    theirs.backward()
    found, scale = theirs.item(), 1.0
    if problem.loss == "kl":
        found = problem.in_our_words(found)
        scale = problem.in_our_words(1.0) - problem.in_our_words(0.0)
    # speculators norms the base's final hidden state once more, with an epsilon of 1e-5.
    assert found == pytest.approx(loss, rel=1e-5), peer
    parameters = {
        name.removeprefix("draft_model."): parameter
        for name, parameter in step.model.named_parameters()
    }
    for name, gradient in gradients.items():
        other = parameters[name.replace("markov.w", "markov_head.markov_w")].grad
        rows = gradient[: len(other)]  # a vocabulary's shard may be padded
        difference = (rows - scale * other).norm()
        assert 0 < difference < 1e-4 * rows.norm(), (peer, name)


def test_losses_and_gradients_agree_with_the_peers() -> None:
    (ours,) = run_distributed(our_steps, 1)
    for problem, (loss, gradients) in zip(PROBLEMS, ours, strict=True):
        peers = ["speculators_blocks"] if problem.loss == "kl" else ["specforge_blocks"]
        for peer in peers:
            compare(problem, peer, loss, gradients)
