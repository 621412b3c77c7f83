"""A base's own next-token module, of every kind: imported, trained in every layout, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.testing.harness import run_distributed
from tests.helpers.module_base import KINDS, make_module_base
from tests.helpers.module_case import compare, make_module_case, train_once
from tests.helpers.reference_case import TOLERANCE

SP = {"tp": 2, "sequence_parallel": True}
EXPERTS = ("deepseek_v3", "glm4_moe", "qwen3_next")
PP2 = {"pp": 2, "first": 3}
slow = pytest.mark.slow
VARIANTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "glm4_moe": {"packed": True},
    "qwen3_next": {},
    "qwen3_5": {},
    "mimo": {"packed": True, "changes": {"detach_steps": True}},
}
LAYOUTS = [
    pytest.param(1, 1, KINDS, {}, id="1", marks=slow),
    pytest.param(2, 1, KINDS, SP, id="tp2-sp"),
    pytest.param(2, 2, EXPERTS, {"ep": 2}, id="ep2"),
    pytest.param(2, 1, ("mimo",), {"tp": 2}, id="tp2", marks=slow),
    pytest.param(2, 1, KINDS, {"cp": 2}, id="cp2", marks=slow),
    pytest.param(2, 1, KINDS, PP2, id="pp2", marks=slow),
    pytest.param(4, 2, EXPERTS, {**SP, "ep": 2}, id="tp2-sp-ep2", marks=slow),
    pytest.param(4, 1, KINDS, {**SP, **PP2}, id="tp2-sp-pp2", marks=slow),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for kind in KINDS:
        make_module_base(folder / kind / "hf", kind)
        import_base(folder / kind / "hf", folder / kind / "base")
    return folder


@pytest.mark.parametrize(("world", "dp", "kinds", "layout"), LAYOUTS)
def test_losses_and_gradients_are_the_oracle_s(
    world: int, dp: int, kinds: tuple[str, ...], layout: dict[str, Any], bases: Path
) -> None:
    count = max(2, layout.get("pp", 1))
    cases = [make_module_case(bases, kind, count, dp, **VARIANTS[kind], **layout) for kind in kinds]
    results = run_distributed(train_once, world, cases)
    cut = layout.get("cp", 1) * layout.get("tp", 1) > 1
    for number, case in enumerate(cases):
        compare(case, [result[number] for result in results], (3 if cut else 1) * TOLERANCE)
