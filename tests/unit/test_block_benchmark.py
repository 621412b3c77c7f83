"""The comparison of block drafts' steps: its problem, its medians, its words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.block_compare import rows, times_of, verdict
from benchmarks.block_problem import BlockProblem

LINE = {
    "cpu_ms": 10.0, "wall_ms": 11.0, "cpu_ms_ratio": 1.0, "wall_ms_ratio": 1.0, "peak_mib": 4.0,
    "loss": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.75])
def test_one_prompt_is_context_alone(fraction: float) -> None:
    problem = BlockProblem(seq=64, vocab=50, hidden=16, anchors=6, mask_fraction=fraction)
    inputs = problem.inputs()
    prompt = int(64 * fraction)
    assert inputs.supervised.tolist() == [0.0] * prompt + [1.0] * (64 - prompt)
    assert len(inputs.anchors.unique()) == 6 and inputs.anchors.equal(inputs.anchors.sort().values)
    assert prompt <= inputs.anchors[0] and inputs.anchors[-1] + problem.block < 64
    assert problem.judged_slots(inputs).all()


def test_blocks_of_short_answers_are_judged_to_the_answer_s_end() -> None:
    """Turns of 4 and 4 tokens, blocks of 4: the anchors 4, 5, 6, 12, ..., 20, 21, 22, ... ."""
    problem = BlockProblem(seq=40, vocab=50, hidden=16, block=4, anchors=12, answer=4)
    inputs = problem.inputs()
    assert inputs.supervised.tolist() == ([0.0] * 4 + [1.0] * 4) * 5
    expected = [turn + first for turn in range(4, 36, 8) for first in range(3)]
    assert inputs.anchors.tolist() == expected
    assert problem.judged_slots(inputs).sum(1).tolist() == [3, 2, 1] * 4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"anchors": 9, "mask_fraction": 0.75}, "8 rows can begin a block, and 9 should"),
        ({"answer": 8, "mask_fraction": 0.25}, "prompts of 3 tokens are shorter than a block"),
    ],
)
def test_what_leaves_too_little_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BlockProblem(seq=64, vocab=50, hidden=16, **fields).inputs()


def test_a_divergence_in_our_words_is_a_cross_entropy_over_the_weights() -> None:
    """One judged slot: the divergence itself, and the base's entropy."""
    problem = BlockProblem(seq=32, vocab=50, hidden=16, anchors=4, block=2)
    inputs = problem.inputs()
    p = (inputs.final_hidden[inputs.anchors] @ inputs.output_weight.t()).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(torch.tensor(problem.in_our_words(0.25)), 0.25 + entropy)


def test_a_ratio_is_the_median_of_the_turns_ratios() -> None:
    """The machine is slow in the second turn, which meets both."""
    times = [(3.0, 6.0), (9.0, 18.0), (4.0, 12.0)]
    turns = [
        {"ours": {"cpu_ms": ours, "wall_ms": 1.0}, "peer": {"cpu_ms": peer, "wall_ms": 3.0}}
        for ours, peer in times
    ]
    assert times_of("peer", turns) == {
        "cpu_ms": 12.0, "cpu_ms_ratio": 2.0, "wall_ms": 3.0, "wall_ms_ratio": 3.0,
    }  # fmt: skip


def test_the_best_peer_is_the_fastest_one_and_every_loss_counts() -> None:
    found = {
        "ours": LINE,
        "slow": {**LINE, "cpu_ms_ratio": 3.0, "loss": 2.1},
        "fast": {**LINE, "cpu_ms": 15.0, "cpu_ms_ratio": 1.5, "peak_mib": 12.0},
    }
    sentence, same = verdict("DFlash ce", found)
    assert sentence.startswith(
        "DFlash ce: the best peer, fast, takes 1.50 times our CPU time and 3.00 times our memory"
    )
    assert not same and "losses DIFFER (5.0e-02)" in sentence
    assert verdict("", {**found, "slow": LINE})[1]
    assert rows("DFlash ce", found)[2] == (
        "| DFlash ce | fast | 15 (1.50) | 11 (1.00) | 12 (3.00) | 2.000000 |"
    )
