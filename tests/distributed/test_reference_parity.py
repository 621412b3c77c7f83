"""Losses, accuracies and every gradient of the draft equal the reference's, in every TP layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_eagle.testing.harness import run_distributed
from tests.helpers.reference_case import (
    EAGLE1,
    EAGLE31,
    EXPERTS,
    FULL_VOCAB,
    MLA,
    QK_NORM,
    YARN,
    compare,
    make_case,
    run_case,
)

CASES = [
    pytest.param(1, {}, id="tp1"),
    pytest.param(1, {"ttt_steps": 1}, id="tp1-k1"),
    pytest.param(1, {"ttt_steps": 5, "num_layers": 2}, id="tp1-k5-two-layers"),
    pytest.param(1, {"detach_steps": True}, id="tp1-detach"),
    pytest.param(1, {"trim": True, "recompute_modules": ("mlp",)}, id="tp1-trim-recompute"),
    pytest.param(2, {}, id="tp2"),
    pytest.param(2, {"sequence_parallel": True, "ttt_steps": 5}, id="tp2-sp-k5"),
    pytest.param(2, {"sequence_parallel": True, "num_layers": 2, "trim": True}, id="tp2-sp-trim"),
    pytest.param(2, {**FULL_VOCAB, "mask_out_of_vocab": True}, id="tp2-full-vocab"),
    pytest.param(2, {"mask_out_of_vocab": True, "ttt_steps": 1}, id="tp2-mask-out-of-vocab"),
    pytest.param(4, {"ttt_steps": 5, "logits_budget_mib": 0}, id="tp4-at-once"),
    pytest.param(4, {"sequence_parallel": True, **FULL_VOCAB}, id="tp4-sp-full-vocab"),
    pytest.param(4, {"draft_vocab_size": 5}, id="tp4-empty-shard"),
    pytest.param(2, {"cp": 2, "num_layers": 2}, id="cp2-two-layers"),
    pytest.param(4, {"cp": 4, "trim": True}, id="cp4-trim"),
    pytest.param(4, {"cp": 2, "sequence_parallel": True, "ttt_steps": 5}, id="tp2-sp-cp2-k5"),
    pytest.param(4, {"cp": 2, "mask_out_of_vocab": True, "trim": True}, id="tp2-cp2-trim"),
    pytest.param(1, {**EAGLE1, "num_layers": 2}, id="tp1-eagle1-two-layers"),
    pytest.param(2, EAGLE1, id="tp2-eagle1"),
    pytest.param(2, {**EAGLE1, "sequence_parallel": True, "trim": True}, id="tp2-sp-eagle1"),
    pytest.param(2, {**EAGLE1, "cp": 2}, id="cp2-eagle1"),
    pytest.param(1, {**EAGLE31, "num_aux": 2}, id="tp1-eagle31"),
    pytest.param(2, {**EAGLE31, "norm_before_residual": True}, id="tp2-eagle31"),
    pytest.param(2, {**EAGLE31, "sequence_parallel": True}, id="tp2-sp-eagle31"),
    pytest.param(2, {"norm_before_fc": True}, id="tp2-norm-before-fc"),
    pytest.param(2, {**QK_NORM, "num_layers": 2}, id="tp2-qk-norm-two-layers"),
    pytest.param(2, {**QK_NORM, **EAGLE31, "sequence_parallel": True}, id="tp2-sp-qk-norm"),
    pytest.param(2, {**QK_NORM, "cp": 2, "mask_token": 7}, id="cp2-qk-norm-p-eagle"),
    pytest.param(1, {"mask_token": 7, "num_layers": 2}, id="tp1-p-eagle-two-layers"),
    pytest.param(2, {"mask_token": 7}, id="tp2-p-eagle"),
    pytest.param(2, {"mask_token": 60, "sequence_parallel": True}, id="tp2-sp-p-eagle"),
    pytest.param(2, {"mask_token": 7, "cp": 2, "num_layers": 2}, id="cp2-p-eagle"),
    pytest.param(1, {**EXPERTS, "num_layers": 2}, id="tp1-moe-two-layers"),
    pytest.param(2, {**EXPERTS, "sequence_parallel": True}, id="tp2-sp-moe"),
    pytest.param(2, {**EXPERTS, "cp": 2, "mask_out_of_vocab": True}, id="cp2-moe"),
    pytest.param(
        4,
        {**EXPERTS, **MLA, "cp": 2, "sequence_parallel": True},
        id="tp2-sp-cp2-mla-moe",
        marks=pytest.mark.slow,
    ),
    pytest.param(1, {**MLA, "rope_scaling": YARN, "num_layers": 2}, id="tp1-mla-yarn"),
    pytest.param(2, MLA, id="tp2-mla"),
    pytest.param(1, {**MLA, **EAGLE1}, id="tp1-mla-eagle1", marks=pytest.mark.slow),
    pytest.param(
        2,
        {**MLA, **EAGLE31, "rope_scaling": YARN, "sequence_parallel": True, "mask_token": None},
        id="tp2-sp-mla-eagle31",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        2,
        {**MLA, "mask_token": 7, "sequence_parallel": True},
        id="tp2-sp-mla-p-eagle",
        marks=pytest.mark.slow,
    ),
    pytest.param(2, {**MLA, "sequence_parallel": True, "q_lora_rank": 0}, id="tp2-sp-mla"),
    pytest.param(2, {**MLA, "cp": 2, "recompute_modules": ("mlp",)}, id="cp2-mla-recompute"),
    pytest.param(2, {"loss": "ce"}, id="tp2-ce"),
    pytest.param(2, {"loss": "tv", **FULL_VOCAB}, id="tp2-tv-full-vocab"),
    pytest.param(2, {"loss": "lk-alpha", "logits_budget_mib": 0}, id="tp2-lk-alpha-at-once"),
    pytest.param(2, {"loss": "lk-lambda", "lk_decay": 2.0}, id="tp2-lk-lambda"),
    pytest.param(2, {"loss": "reverse-kl", "logits_budget_mib": 0}, id="tp2-reverse-at-once"),
    pytest.param(4, {"loss": "reverse-kl", "draft_vocab_size": 5}, id="tp4-reverse-empty-shard"),
    pytest.param(4, {"loss": "ce", "draft_vocab_size": 5}, id="tp4-ce-empty-shard"),
    pytest.param(4, {"loss": "lk-lambda", "sequence_parallel": True}, id="tp4-sp-lk-lambda"),
    pytest.param(
        2,
        {"norm_before_fc": True, "norm_before_residual": True, "sequence_parallel": True},
        id="tp2-sp-norms",
    ),
]


@pytest.mark.parametrize(("world", "changes"), CASES)
def test_equals_reference(world: int, changes: dict[str, Any]) -> None:
    case, reference = make_case(**changes)
    compare(case, reference, run_distributed(run_case, world, case))


PROMPTS = [
    pytest.param(1, {"num_layers": 2, "ttt_steps": 5}, id="tp1-two-layers"),
    pytest.param(4, {"sequence_parallel": True}, id="tp4-sp"),
    pytest.param(4, {"sequence_parallel": True, "mask_token": 7, "num_layers": 2}, id="tp4-sp-p"),
    pytest.param(4, {"cp": 2, "sequence_parallel": True, **MLA}, id="tp2-sp-cp2-mla"),
    pytest.param(2, {**EAGLE1, "cp": 2}, id="cp2-eagle1"),
]


@pytest.mark.parametrize(("world", "changes"), PROMPTS)
def test_prompts_may_fill_whole_ranks(world: int, changes: dict[str, Any]) -> None:
    """Only the last three tokens are supervised: with CP 2 one rank has no row to judge, and with
    sequence parallelism most ranks' own rows are prompts."""
    case, reference = make_case(**changes)
    mask = torch.zeros_like(case.loss_mask)
    mask[0, 20:] = mask[1, 21] = 1
    case = dataclasses.replace(case, loss_mask=mask)
    compare(case, reference, run_distributed(run_case, world, case))


EVERY_ROW = [
    pytest.param(1, {"num_layers": 2, "ttt_steps": 5}, id="tp1-two-layers"),
    pytest.param(4, {"cp": 2, "sequence_parallel": True, "mask_token": 7}, id="tp2-sp-cp2-p-eagle"),
]


@pytest.mark.parametrize(("world", "changes"), EVERY_ROW)
def test_all_rows_may_go_on(world: int, changes: dict[str, Any]) -> None:
    """As where nearly all are supervised: nothing is gathered, and rows keep their places."""
    case, reference = make_case(every_row=True, **changes)
    compare(case, reference, run_distributed(run_case, world, case))


def test_the_comparison_can_fail() -> None:
    """A draft with one weight off must not pass for the reference."""
    case, reference = make_case()
    case.weights["norm.weight"][0] += 0.01
    with pytest.raises(AssertionError, match="relative difference"):
        compare(case, reference, run_distributed(run_case, 1, case))
