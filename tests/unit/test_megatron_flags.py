"""Every flag of Megatron's parser is judged, and the judgements hold for a command line."""

from __future__ import annotations

import importlib
from collections import Counter
from unittest import mock

import pytest

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.config import EagleConfig
from megatron_eagle.errors import UserError
from megatron_eagle.teacher import description
from megatron_eagle.teacher.megatron_parser import megatron_parser
from megatron_eagle.training.flag_table.check import CommandLine, check_flags
from megatron_eagle.training.flag_table.conditions import check_conditions
from megatron_eagle.training.flag_table.judgement import Verdict
from megatron_eagle.training.flag_table.table import BY_FLAG, PARTS, judgement_of, training_parser
from megatron_eagle.training.frozen_config import flags_by_name

OF_OTHER_PACKAGES = {"--kitchen-config-file", "--kitchen-recipe-number"}
"""Flags that the parser has only where a package of NVIDIA's is installed."""
BASE = ["--hidden-size", "48", "--num-layers", "7", "--swiglu", "--attention-dropout", "0.0"]


def test_every_flag_of_the_parser_is_judged() -> None:
    actions = [a for a in training_parser()._actions if a.option_strings]
    assert len(actions) > 700
    unjudged = [
        a.option_strings
        for a in actions
        if judgement_of(a) is None and not a.option_strings[0].startswith("--eagle-")
    ]
    assert not unjudged, "judge these flags in megatron_eagle/training/flag_table"


def test_a_start_builds_megatrons_parser_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the one that Megatron's trainer builds: of all its flags, building takes long."""
    arguments = importlib.import_module("megatron.training.arguments")
    add = mock.Mock(wraps=arguments.add_megatron_arguments)
    monkeypatch.setattr(arguments, "add_megatron_arguments", add)
    for made in (megatron_parser, training_parser, description._parser_defaults, flags_by_name):
        made.cache_clear()
    for words in (BASE, [*BASE, "--eagle-ttt-steps", "2"]):
        check_flags(CommandLine.parse(words), BASE)
    info = BaseInfo("llama", "base", "", 61, {}, {"num_layers": 7, "hidden_size": 48})
    assert description.base_arguments(info).hidden_size == 48
    assert flags_by_name()["hidden_size"] == "--hidden-size"
    add.assert_called_once_with(megatron_parser())
    assert not any(action.dest.startswith("eagle_") for action in megatron_parser()._actions)


def test_every_judgement_is_of_a_flag_that_exists_once() -> None:
    names = {name for a in training_parser()._actions for name in a.option_strings}
    assert set(BY_FLAG) - names <= OF_OTHER_PACKAGES
    flags = Counter(f for part in PARTS.values() for judgement in part for f in judgement.flags)
    assert max(flags.values()) == 1
    whys = [judgement.why for part in PARTS.values() for judgement in part]
    assert all(why.strip() for why in whys)


REFUSED = [
    (["--fp8-format", "hybrid"], "--fp8-format hybrid is not supported: the base runs without"),
    (["--fp4-format", "e2m1"], "--fp4-format e2m1 is not supported"),
    (["--te-precision-config-file", "x"], "--te-precision-config-file x is not supported"),
    (["--tp-comm-overlap"], "--tp-comm-overlap needs buffers of one shape"),
    (["--cuda-graph-impl", "local"], "--cuda-graph-impl local captures static shapes"),
    (["--enable-cuda-graph"], "--enable-cuda-graph captures static shapes"),
    (["--fine-grained-activation-offloading"], "is not supported: the base keeps no activations"),
    (["--cpu-offloading-num-layers", "2"], "--cpu-offloading-num-layers 2 is not supported"),
    (["--overlap-moe-expert-parallel-comm"], "reorders the passes of a layer"),
    (["--delay-wgrad-compute"], "--delay-wgrad-compute reorders the passes of a layer"),
    (["--transformer-impl", "inference_optimized"], "inference_optimized chooses layers that are"),
    (["--attention-backend", "local"], "--attention-backend local is not supported"),
    (["--mla-down-proj-fusion"], "--mla-down-proj-fusion stores experts"),
    (["--ckpt-format", "torch"], "--ckpt-format torch is not supported: only torch_dist"),
    (["--ddp-average-in-collective"], "--ddp-average-in-collective is not supported: the loss"),
    (["--cp-comm-type", "a2a"], "--cp-comm-type a2a is not supported"),
    (["--mtp-num-layers", "1"], "--mtp-num-layers 1 is not supported yet"),
    (["--perform-rl-step"], "--perform-rl-step belongs to reinforcement learning"),
    (["--rotary-interleaved"], "--rotary-interleaved contradicts the base checkpoint"),
    (["--apply-layernorm-1p"], "--apply-layernorm-1p contradicts the base checkpoint"),
    (["--moe-router-force-load-balancing"], "contradicts the base checkpoint"),
    (["--moe-expert-capacity-factor", "0.5"], "factor 0.5 contradicts the base checkpoint"),
    (["--hidden-size=64"], "--hidden-size 64 contradicts the base checkpoint, which has 48"),
    (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
    (["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_flag_is_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_flags(CommandLine.parse(words), BASE)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_changes_nothing_is_said_and_the_rest_passes() -> None:
    words = [
        *BASE, "--lr", "1e-4", "--ckpt-format", "torch_dist", "--cuda-graph-impl", "none",
        "--attention-backend", "flash", "--cp-comm-type", "p2p", "--use-mcore-models",
        "--cross-entropy-loss-fusion", "--eagle-ttt-steps", "2",
    ]  # fmt: skip
    lines = check_flags(CommandLine.parse(words), BASE)
    assert [line.split(" (")[0] for line in lines] == [
        "no effect: --use-mcore-models",
        "no effect: --cross-entropy-loss-fusion",
    ]


DOCUMENTS = EagleConfig.of(base_checkpoint="base", train_data="answers.jsonl")
MEGATRON_DATA = EagleConfig.of(base_checkpoint="base")
TRACKED = ["--wandb-exp-name", "e", "--wandb-save-dir", "w", "--tensorboard-dir", "t"]


def _conditions(words: list[str], installed: set[str] = frozenset(), **kw: object) -> list[str]:
    options = kw.get("options", MEGATRON_DATA)
    layers = kw.get("layers", "local")
    return check_conditions(
        CommandLine.parse(words), options, layers, installed=lambda package: package in installed
    )


@pytest.mark.parametrize(
    ("words", "package", "message"),
    [
        (["--wandb-project", "p"], "wandb", "--wandb-project p needs the package wandb"),
        (["--tensorboard-dir", "d"], "tensorboard", "--tensorboard-dir d needs the package"),
        (["--optimizer", "muon"], "emerging_optimizers", "--optimizer muon needs the package"),
        (
            ["--num-distributed-optimizer-instances", "2"],
            "einops",
            "--num-distributed-optimizer-instances 2 needs the package einops",
        ),
        (
            ["--use-precision-aware-optimizer"],
            "transformer_engine",
            "--use-precision-aware-optimizer needs Transformer Engine's Adam",
        ),
    ],
)
def test_a_flag_needs_its_package(words: list[str], package: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _conditions(words)
    words = [*words, *TRACKED] if package == "wandb" else words
    assert _conditions(words, {package, "tensorboard"}) == []


@pytest.mark.parametrize("left_out", ["--wandb-exp-name", "--wandb-save-dir", "--tensorboard-dir"])
def test_weights_and_biases_needs_what_megatron_takes_for_granted(left_out: str) -> None:
    cut = TRACKED.index(left_out)
    words = ["--wandb-project", "p", *TRACKED[:cut], *TRACKED[cut + 2 :]]
    with pytest.raises(UserError, match=f"--wandb-project p needs {left_out}"):
        _conditions(words, {"wandb", "tensorboard"})


def test_flags_are_refused_beside_others() -> None:
    with pytest.raises(UserError, match="--moe-grouped-gemm needs --transformer-impl"):
        _conditions(["--moe-grouped-gemm"])
    assert _conditions(["--moe-grouped-gemm"], layers="transformer_engine") == []
    spiky = ["--check-for-spiky-loss"]
    assert _conditions(spiky) == []
    with pytest.raises(UserError, match="--pipeline-model-parallel-size 2"):
        _conditions([*spiky, "--pipeline-model-parallel-size", "2"])


def test_a_learning_rate_of_the_head_needs_one_that_learns() -> None:
    assert _conditions(["--decoupled-lr", "5e-4"]) == []
    frozen = EagleConfig.of(base_checkpoint="base", algorithm="eagle1")
    with pytest.raises(UserError, match=r"--decoupled-lr 0\.0005 would change nothing: --eagle-al"):
        _conditions(["--decoupled-lr", "5e-4"], options=frozen)


def test_fp32_on_a_gpu_is_told_what_it_costs() -> None:
    for words, lines in (([], 1), (["--bf16"], 0), (["--fp16"], 0)):
        line = CommandLine.parse(words)
        assert len(check_conditions(line, MEGATRON_DATA, "local", on_gpu=True)) == lines
        assert check_conditions(line, MEGATRON_DATA, "local") == []


def test_documents_take_the_place_of_megatrons_data() -> None:
    with pytest.raises(UserError, match="--data-path d contradicts --eagle-train-data"):
        _conditions(["--data-path", "d"], options=DOCUMENTS)
    words = ["--split", "99,1,0", "--eval-iters", "32"]
    assert [line.split(" (")[0] for line in _conditions(words, options=DOCUMENTS)] == [
        "no effect: --split 99,1,0",
        "no effect: --eval-iters 32",
    ]
    assert _conditions(words) == []


def test_all_verdicts_are_used() -> None:
    assert {judgement.verdict for judgement in BY_FLAG.values()} == set(Verdict)
