"""Every algorithm, loss, base and packing on pipeline stages and context-parallel ranks: losses and
gradients equal the reference's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.testing.harness import run_distributed
from tests.helpers.pipeline_case import (
    AUX_LAYERS,
    CONFIG,
    compare,
    import_bases,
    make_case,
    train_once,
)
from tests.helpers.pipeline_fixture import PipelineCase
from tests.helpers.reference_case import TOLERANCE
from tests.helpers.tiny_hf import make_base

FULL_VOCAB = {"draft_vocab_size": CONFIG.vocab_size}
EAGLE31 = {"fc_norm": True, "norm_output": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "eagle1": {"eagle1": True, "num_aux": 1, "aux_layers": (), **FULL_VOCAB},
    "eagle3.1": EAGLE31,
    "two-layers": {"num_layers": 2},
    "norms": {"norm_before_fc": True, "norm_before_residual": True},
    "p-eagle": {"mask_token": 7},
    "mask-out-of-vocab": {"mask_out_of_vocab": True},
    "detached": {"detach_steps": True},
    "ce": {"loss": "ce"},
    "reverse-kl": {"loss": "reverse-kl"},
    "tv": {"loss": "tv", **FULL_VOCAB},
    "lk-alpha": {"loss": "lk-alpha"},
    "lk-lambda": {"loss": "lk-lambda", "lk_decay": 2.0},
    "packed": {"packed": True, "ttt_steps": 4},
    "packed-eagle1": {"packed": True, "eagle1": True, "num_aux": 1, "aux_layers": (), **FULL_VOCAB},
    "packed-eagle3.1": {"packed": True, **EAGLE31},
    "packed-p-eagle": {"packed": True, "mask_token": 7},
    "latent-base": {"base": "latent", "aux_layers": (0, 1, 3), "num_kv_heads": 8, "first": 1},
}
"""Fields of the reference's configuration, or of the case."""
SP = {"tp": 2, "sequence_parallel": True}
LAYOUTS = [
    pytest.param(2, {"pp": 2, "first": 3}, id="pp2"),
    pytest.param(2, {"cp": 2}, id="cp2"),
    pytest.param(4, {"pp": 2, "first": 3, "cp": 2}, id="pp2-cp2", marks=pytest.mark.slow),
    pytest.param(4, {"pp": 2, "first": 3, **SP}, id="tp2-sp-pp2", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = import_bases(tmp_path_factory.mktemp("bases"))
    for name, family in (("latent", "deepseek_v3"), ("experts", "mixtral")):
        make_base(folder / f"{name}_hf", family, num_hidden_layers=4)
        import_base(folder / f"{name}_hf", folder / name)
    return folder


def family_case(bases: Path, family: str, layout: dict[str, Any]) -> PipelineCase:
    fields = {"base": "untied", "aux_layers": AUX_LAYERS, "packed": False, **FAMILIES[family]}
    names = {field.name for field in dataclasses.fields(CONFIG)}
    config = dataclasses.replace(CONFIG, **{k: v for k, v in fields.items() if k in names})
    if "first" in fields and "first" in layout:
        layout = {**layout, "first": fields["first"]}
    return make_case(
        bases, fields["base"], 3, 1, config=config, aux_layers=fields["aux_layers"],
        packed=fields["packed"], **layout,
    )  # fmt: skip


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_equals_reference(world: int, layout: dict[str, Any], bases: Path) -> None:
    """Start the ranks once for all families."""
    cases = [family_case(bases, family, layout) for family in FAMILIES]
    results = run_distributed(train_once, world, cases)
    # The reference reads what an undivided base gives; one whose layers are cut rounds otherwise.
    cut = layout.get("cp", 1) * layout.get("tp", 1) > 1
    wrong = []
    for number, (family, case) in enumerate(zip(FAMILIES, cases, strict=True)):
        try:
            compare(case, [result[number] for result in results], (3 if cut else 1) * TOLERANCE)
        except AssertionError as error:
            wrong.append(f"{family}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("world", "dp", "layout"),
    [
        pytest.param(2, 2, {"ep": 2}, id="ep2"),
        pytest.param(4, 2, {"ep": 2, "pp": 2, "first": 1}, id="ep2-pp2", marks=pytest.mark.slow),
        pytest.param(4, 2, {"ep": 2, **SP}, id="tp2-sp-ep2", marks=pytest.mark.slow),
    ],
)
def test_a_base_of_experts_equals_the_reference(
    world: int, dp: int, layout: dict[str, Any], bases: Path
) -> None:
    config = dataclasses.replace(CONFIG, rope_theta=1e6)  # Mixtral's
    case = make_case(bases, "experts", 3, dp, config=config, aux_layers=(0, 1, 3), **layout)
    compare(case, [result for (result,) in run_distributed(train_once, world, [case])])
