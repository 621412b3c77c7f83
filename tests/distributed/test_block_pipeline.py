"""Block drafts beside a real base on pipeline stages, context-, expert- and data-parallel ranks, in
Megatron's DDP: losses and gradients equal the oracle's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.testing.harness import run_distributed
from tests.helpers.block_case import DSPARK
from tests.helpers.block_pipeline import compare_blocks, make_block_case
from tests.helpers.pipeline_case import import_bases, train_once
from tests.helpers.reference_case import TOLERANCE
from tests.helpers.tiny_hf import make_base

CASES: dict[str, dict[str, Any]] = {
    "dflash": {"draft": {}},
    "dflash-packed-compressed": {
        "draft": {"draft_vocab_size": 23, "kl": 0.5, "decay": None}, "packed": True,
    },
    "dspark-rnn": {"draft": {**DSPARK, "markov": "rnn"}},
}  # fmt: skip
SP = {"tp": 2, "sequence_parallel": True}
LAYOUTS = [
    pytest.param(2, 1, {"pp": 2, "first": 3}, id="pp2"),
    pytest.param(2, 1, {"tp": 2}, id="tp2"),
    pytest.param(2, 2, {"distributed_optimizer": True}, id="dp2-distributed-optimizer"),
    pytest.param(2, 1, {"cp": 2}, id="cp2", marks=pytest.mark.slow),
    pytest.param(3, 1, {"pp": 3, "first": 3}, id="pp3", marks=pytest.mark.slow),
    pytest.param(4, 1, {"pp": 2, "first": 3, **SP}, id="tp2-sp-pp2", marks=pytest.mark.slow),
    pytest.param(4, 1, {"pp": 2, "first": 3, "cp": 2}, id="pp2-cp2", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = import_bases(tmp_path_factory.mktemp("bases"))
    make_base(folder / "experts_hf", "mixtral", num_hidden_layers=4)
    import_base(folder / "experts_hf", folder / "experts")
    return folder


@pytest.mark.parametrize(("world", "dp", "layout"), LAYOUTS)
def test_equals_the_oracle(world: int, dp: int, layout: dict[str, Any], bases: Path) -> None:
    """With DDP both uses of linear_qkv's weight must reach its gradient."""
    cases = [make_block_case(bases, "untied", 3, dp, **case, **layout) for case in CASES.values()]
    results = run_distributed(train_once, world, cases)
    cut = layout.get("cp", 1) * layout.get("tp", 1) > 1
    for number, case in enumerate(cases):
        compare_blocks(case, [result[number] for result in results], (3 if cut else 1) * TOLERANCE)


@pytest.mark.parametrize(
    ("world", "dp", "layout"),
    [
        pytest.param(2, 2, {"ep": 2}, id="ep2"),
        pytest.param(4, 2, {"ep": 2, **SP}, id="tp2-sp-ep2", marks=pytest.mark.slow),
    ],
)
def test_a_base_of_experts(world: int, dp: int, layout: dict[str, Any], bases: Path) -> None:
    draft = {**DSPARK, "rope_theta": 1e6}  # Mixtral's
    case = make_block_case(bases, "experts", 3, dp, aux_layers=(0, 1, 3), draft=draft, **layout)
    results = [result for (result,) in run_distributed(train_once, world, [case])]
    compare_blocks(case, results, 3 * TOLERANCE)
