"""Flags that would change what the frozen base computes: refused by name, not taken in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.testing.harness import run_distributed
from tests.e2e.conftest import Inputs
from tests.e2e.launch import RECIPE
from tests.helpers.native_files import namespace, save
from tests.helpers.refused_flags import refusal
from tests.helpers.tiny_hf import make_base

DENSE = [
    (["--rotary-interleaved"], "--rotary-interleaved"),
    (["--rotary-seq-len-interpolation-factor", 2], "--rotary-seq-len-interpolation-factor"),
    (["--no-rope-freq", 2], "--no-rope-freq"),
    (["--apply-layernorm-1p"], "--apply-layernorm-1p"),
    (["--apply-residual-connection-post-layernorm"], "--apply-residual-connection-post-layernorm"),
    (["--fp32-residual-connection"], "--fp32-residual-connection"),
    (["--attention-output-gate"], "--attention-output-gate"),
]
EXPERTS = [
    (["--moe-router-force-load-balancing"], "--moe-router-force-load-balancing"),
    (["--moe-expert-capacity-factor", 0.5], "--moe-expert-capacity-factor"),
    (["--moe-router-topk-scaling-factor", 2], "--moe-router-topk-scaling-factor"),
    (["--moe-input-jitter-eps", 0.1], "--moe-input-jitter-eps"),
]
HARMLESS = [
    *("--moe-aux-loss-coeff", 0.01, "--moe-z-loss-coeff", 0.001),
    *("--moe-token-dispatcher-type", "alltoall", "--init-method-std", 0.01),
]
"""Flags of MoE recipes that a frozen base does not read."""


def words_of(*words: object) -> list[str]:
    return [str(word) for word in [*RECIPE, *words]]


@pytest.mark.parametrize(("words", "flag"), DENSE, ids=lambda value: str(value)[:40])
def test_a_flag_that_changes_a_dense_base_is_refused(
    words: list, flag: str, inputs: Inputs
) -> None:
    (error,) = run_distributed(refusal, 1, words_of(*inputs.flags, *words))
    assert error.startswith(flag) and "contradicts the base checkpoint" in error, error


@pytest.fixture(scope="module")
def experts(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder: Path = tmp_path_factory.mktemp("experts")
    make_base(folder / "hf", "qwen3_moe", num_hidden_layers=7)
    import_base(folder / "hf", folder / "base")
    return [*inputs.flags, "--eagle-base-checkpoint", folder / "base"]


@pytest.mark.parametrize(("words", "flag"), EXPERTS, ids=lambda value: str(value)[:40])
def test_a_flag_that_changes_a_router_is_refused(
    words: list, flag: str, experts: list[object]
) -> None:
    (error,) = run_distributed(refusal, 1, words_of(*experts, *words))
    assert error.startswith(flag) and "contradicts the base checkpoint" in error, error


def test_flags_of_training_alone_are_accepted(experts: list[object]) -> None:
    assert run_distributed(refusal, 1, words_of(*experts, *HARMLESS)) == ["accepted"]


NATIVE = {
    "--num-layers 3": "--num-layers 3 contradicts the base checkpoint",
    "--rotary-base 7": "--rotary-base 7 contradicts the base checkpoint",
    "--normalization LayerNorm": "--normalization LayerNorm contradicts the base checkpoint",
    "--spec a b": "--spec",
    "--heterogeneous-layers-config-path x.json": "--heterogeneous-layers-config-path",
    "": "accepted",
}
"""Flags beside a base that Megatron saved -> how the answer begins."""


def answers(rank: int, world: int, words: list[str]) -> dict[str, str]:
    return {flags: refusal(rank, world, [*words, *flags.split()]) for flags in NATIVE}


@pytest.mark.slow
def test_a_flag_that_contradicts_a_native_base_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    arguments = namespace(num_attention_heads=4, kv_channels=2)
    base = save(tmp_path / "native", arguments)
    words = words_of(*inputs.flags, "--eagle-base-checkpoint", base, "--eagle-aux-layers", 0, 1)
    (said,) = run_distributed(answers, 1, words)
    for flags, beginning in NATIVE.items():
        assert said[flags].startswith(beginning) and "\n" not in said[flags], said[flags]
