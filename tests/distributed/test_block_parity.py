"""Losses, metrics and every gradient of a block draft equal the oracle's, in every layout."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_eagle.testing.harness import run_distributed
from tests.helpers.block_case import COMPRESSED, DSPARK, TOLERANCE, compare, make_case, run_cases

CASES: dict[str, dict[str, Any]] = {
    "dflash": {},
    "dflash-kl-compressed": {"ce": 0.0, "kl": 1.0, **COMPRESSED},
    "dflash-d-pace-packed": {"decay": None, "packed": True, "block_size": 5},
    "dflash-mixed-drawn": {"ce": 0.3, "kl": 0.5, "l1": 0.7, "anchors": 6, "num_aux": 2},
    "dflash-data-alone": {"counts_data": True, "decay": None, "packed": True, **COMPRESSED},
    "dspark": DSPARK,
    "dspark-gated-compressed": {**DSPARK, "markov": "gated", **COMPRESSED},
    "dspark-rnn-packed-d-pace": {**DSPARK, "markov": "rnn", "packed": True, "decay": None},
    "dspark-at-once": {**DSPARK, "logits_budget_mib": 0, "anchors": 7, "num_layers": 1},
}
LAYOUTS = [
    pytest.param(1, {}, id="tp1"),
    pytest.param(2, {}, id="tp2"),
    pytest.param(2, {"sequence_parallel": True}, id="tp2-sp"),
    pytest.param(2, {"cp": 2}, id="cp2"),
    pytest.param(4, {}, id="tp4", marks=pytest.mark.slow),
    pytest.param(4, {"cp": 2, "sequence_parallel": True}, id="tp2-sp-cp2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_equals_the_oracle(world: int, layout: dict[str, Any]) -> None:
    """Start the ranks once for all cases."""
    cases = [make_case(**changes, **layout) for changes in CASES.values()]
    results = run_distributed(run_cases, world, cases)
    wrong = []
    for number, (name, case) in enumerate(zip(CASES, cases, strict=True)):
        try:
            compare(case, [result[number] for result in results], TOLERANCE)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)


def test_the_comparison_can_fail() -> None:
    """A draft with one weight off must not pass for the oracle."""
    case = make_case()
    case.weights["hidden_norm.weight"][0] += 0.01
    results = run_distributed(run_cases, 1, [case])
    case.weights["hidden_norm.weight"][0] -= 0.01
    with pytest.raises(AssertionError, match="relative difference"):
        compare(case, [result for (result,) in results])
