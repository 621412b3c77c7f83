"""Layouts that cannot work are refused in one line, before anything is built."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

import pytest

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.config import EagleConfig
from megatron_eagle.errors import UserError
from megatron_eagle.training.layout import (
    check_layout,
    check_micro_batches,
    layout_flags,
    sizes_without_trainer,
)

BASE = BaseInfo(
    family="llama",
    name="tiny",
    fingerprint="",
    vocab_size=61,
    hf_config={},
    megatron_args={
        "num_layers": 7,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 6,
        "ffn_hidden_size": 80,
        "hidden_size": 48,
    },
)
PP3 = ["--pipeline-model-parallel-size", 3]
LAYOUTS = [
    (
        ["--tensor-model-parallel-size", 3],
        "--tensor-model-parallel-size 3 does not divide the base's num_attention_heads = 8",
    ),
    (["--context-parallel-size", 2], "--context-parallel-size 2 does not divide the 3 processes"),
    (["--context-parallel-size", 3], "--seq-length 32 is not a multiple of 6"),
    (
        ["--context-parallel-size", 3, "--seq-length", 12],
        "pieces of 2 tokens, fewer than --eagle-ttt-steps 3",
    ),
    (
        ["--expert-model-parallel-size", 3],
        "--expert-model-parallel-size 3: the base has no experts",
    ),
    (["--pipeline-model-parallel-size", 2], "2 does not divide the 3 processes"),
    (
        ["--pipeline-model-parallel-size", 3],
        "--pipeline-model-parallel-size 3 does not divide the base's 7 layers; give "
        "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers, or",
    ),
    (
        [*PP3, "--decoder-first-pipeline-num-layers", 3, "--ddp-bucket-size", 7],
        "--ddp-bucket-size 7: with --pipeline-model-parallel-size 3 the draft's gradients are one",
    ),
]


MOE_LAYOUTS = [
    ([], "--eagle-num-experts 4 needs --sequence-parallel"),
    (["--sequence-parallel"], "size 2 does not divide --eagle-moe-ffn-hidden-size 33"),
    (
        ["--sequence-parallel", "--expert-model-parallel-size", "8"],
        "--expert-model-parallel-size 8 does not divide --eagle-num-experts 4",
    ),
    (
        ["--sequence-parallel", "--expert-tensor-parallel-size", "1"],
        "--eagle-num-experts 4 is not supported with --expert-tensor-parallel-size 1 beside "
        "--tensor-model-parallel-size 2",
    ),
]


@pytest.mark.parametrize(("words", "message"), MOE_LAYOUTS, ids=lambda value: str(value)[:60])
def test_layouts_that_experts_do_not_fit_are_refused(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = EagleConfig.of(num_experts=4, moe_ffn_hidden_size=33)
    layout = ["--seq-length", "32", "--tensor-model-parallel-size", "2", *words]
    with pytest.raises(UserError, match=re.escape(message)):
        check_layout(layout, BASE, options)


def test_key_value_heads_that_tensor_parallelism_does_not_divide_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    layout = ["--seq-length", "32", "--tensor-model-parallel-size", "8"]
    with pytest.raises(UserError, match="8 does not divide the base's num_query_groups = 4"):
        check_layout(layout, BASE, EagleConfig())


def test_the_draft_s_own_widths_are_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    layout = ["--seq-length", "32", "--tensor-model-parallel-size", "2"]
    with pytest.raises(UserError, match="draft's ffn_hidden_size = 33"):
        check_layout(layout, BASE, EagleConfig.of(ffn_hidden_size=33))


@pytest.mark.parametrize(("words", "message"), LAYOUTS, ids=lambda value: str(value)[:60])
def test_bad_layouts_are_refused(
    words: list, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=re.escape(message)):
        check_layout(["--seq-length", "32", *map(str, words)], BASE, EagleConfig())


EXPERTS = [
    (["--expert-model-parallel-size", 3], "-size 3 does not divide the base's 4 experts"),
    (["--expert-model-parallel-size", 2], "-size 2 does not divide the 3 processes"),
    (
        ["--expert-model-parallel-size", 1, "--expert-tensor-parallel-size", 2],
        "--expert-tensor-parallel-size 2 does not divide the 3 processes",
    ),
    (
        ["--expert-model-parallel-size", 2, "--moe-token-dispatcher-type", "allgather"],
        "--moe-token-dispatcher-type allgather: with --expert-model-parallel-size 2",
    ),
]


@pytest.mark.parametrize(("words", "message"), EXPERTS, ids=lambda value: str(value)[:60])
def test_bad_expert_layouts_are_refused(
    words: list, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    base = dataclasses.replace(BASE, megatron_args={**BASE.megatron_args, "num_experts": 4})
    with pytest.raises(UserError, match=re.escape(message)):
        check_layout([str(word) for word in words], base, EagleConfig())


def test_uneven_layers_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    words = ["--pipeline-model-parallel-size", "3", "--decoder-first-pipeline-num-layers", "3"]
    check_layout(words, BASE, EagleConfig())
    assert layout_flags(words) == ["--ddp-bucket-size", str(2**62)]
    assert layout_flags([]) == []


def test_a_stage_without_a_micro_batch_is_refused() -> None:
    args = argparse.Namespace(
        pipeline_model_parallel_size=4, rampup_batch_size=None, global_batch_size=12,
        micro_batch_size=2, data_parallel_size=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="-size 4 needs as many micro-batches, there are 3"):
        check_micro_batches(args)


@pytest.mark.parametrize(
    ("processes", "flags", "base", "sizes"),
    [
        (8, "", {}, (8, 1, 1, 1, None)),
        (8, "--pipeline-model-parallel-size 2", {}, (4, 2, 1, 1, None)),
        (8, "--tensor-model-parallel-size 2 --context-parallel-size 2", {}, (2, 1, 2, 1, None)),
        (8, "--expert-model-parallel-size 4", {"num_experts": 8}, (2, 1, 1, 4, None)),
        (2, "--expert-model-parallel-size 2 --tensor-model-parallel-size 2",
         {"num_experts": 8, "expert_tensor_parallel_size": 1}, (2, 1, 1, 2, 1)),
        (6, "--pipeline-model-parallel-size 4", {}, "does not divide the 6 processes"),
        (8, "--tensor-model-parallel-size 3", {}, "-size 3 does not divide the 8 processes"),
        (2, "--expert-model-parallel-size 2 --tensor-model-parallel-size 2", {"num_experts": 8},
         "--expert-tensor-parallel-size 2 does not divide the 2 processes"),
        (2, "--expert-model-parallel-size 2", {}, "-model-parallel-size 2: the base has no"),
        (2, "--expert-tensor-parallel-size 2", {}, "--expert-tensor-parallel-size 2: the base has"),
    ],
)  # fmt: skip
def test_a_layout_without_the_trainer_fills_the_processes(
    processes: int, flags: str, base: dict[str, int], sizes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    args = {
        name.removeprefix("--").replace("-", "_"): int(size)
        for name, size in zip(flags.split()[::2], flags.split()[1::2], strict=True)
    }
    args.setdefault("tensor_model_parallel_size", None)
    model = dataclasses.replace(BASE, megatron_args=base)
    if isinstance(sizes, str):
        with pytest.raises(UserError, match=sizes):
            sizes_without_trainer(model, **args)
    else:
        assert tuple(sizes_without_trainer(model, **args).values()) == sizes
