"""The quality study: every variant is a draft, FLOP are those of a step, the table is right."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks.block_problem import BlockProblem
from benchmarks.gpu_model import product_flop
from benchmarks.problem import Problem
from benchmarks.quality import runs_of
from benchmarks.quality_flop import Answers, Draft, Rows, Sizes, matched_iterations, step_flop
from benchmarks.quality_report import BLOCK_COLUMNS, Result, supervised_rows, table
from benchmarks.quality_variants import BLOCKS, GROUPS, Group
from megatron_eagle.config import EagleConfig
from megatron_eagle.config.flags import add_eagle_flags
from megatron_eagle.objective.batch import EagleBatch
from megatron_eagle.objective.block_batch import BlockBatch, BlockShape
from megatron_eagle.testing.harness import megatron_parallel, run_distributed

SIZES = Sizes(hidden=64, ffn=128, queries=64, keys=32, vocab=90, layers=5)
EAGLE3 = {"--eagle-draft-vocab-size": "50"}
BLOCK = BlockProblem(
    hidden=64, intermediate=128, heads=4, kv_heads=2, vocab=90, seq=96, layers=2, block=4,
    anchors=20, rank=16,
)  # fmt: skip
LENGTHS = [(40, 30), (2, 9), (7, 2)]
"""Tokens of prompts and answers; one prompt is shorter than a draft's steps."""


@pytest.mark.parametrize("name", GROUPS)
def test_the_flags_of_every_variant_make_a_draft(name: str) -> None:
    group = GROUPS[name]
    for variant in group.variants:
        parser = argparse.ArgumentParser()
        add_eagle_flags(parser)
        words = " ".join(" ".join(pair) for pair in group.flags(variant).items()).split()
        args, others = parser.parse_known_args(words)
        assert others in ([], ["--seed", "4321"], ["--lr", "1e-3"], ["--lr", "6e-4"])
        options = EagleConfig.from_args(args)
        if group.reference is not None:
            draft = Draft.of(group.flags(variant))
            assert (draft.steps, draft.layers) == (options.steps, options.spec.num_layers)
            assert (draft.block is None) != options.spec.method.drafts_blocks
            assert draft.vocab == options.spec.draft_vocab_size
            assert group.reads_stored_features(variant) == (
                options.spec.aux_layers == group.aux_layers
            )


def _mask(prompt: int, answer: int) -> torch.Tensor:
    """Entry i: is the next token of the answer?"""
    index = torch.arange(prompt + answer)
    return ((index >= prompt - 1) & (index < prompt + answer - 1)).float()[None]


@pytest.mark.parametrize(("prompt", "answer"), LENGTHS)
def test_the_rows_of_an_unrolled_draft_are_those_of_its_batch(prompt: int, answer: int) -> None:
    tokens = torch.zeros(1, prompt + answer, dtype=torch.int64)
    batch = EagleBatch.build(tokens, _mask(prompt, answer), 3, trim=True)
    rows = Rows.of(Draft.of(EAGLE3), prompt, answer)
    assert rows.tokens == batch.tokens.numel()
    assert rows.judged == int(batch.step_mask.sum())
    assert rows.targets == batch.target_rows.numel()
    assert rows.run == len(batch.step_rows[batch.step_mask].unique())


@pytest.mark.parametrize(("prompt", "answer"), LENGTHS)
@pytest.mark.parametrize("algorithm", ["dflash", "dspark"])
def test_the_rows_of_a_block_draft_are_those_of_its_batch(
    algorithm: str, prompt: int, answer: int
) -> None:
    draft = Draft.of({"--eagle-algorithm": algorithm, "--eagle-block-size": "4"})
    shape = BlockShape(4, 0 if algorithm == "dspark" else 1)
    tokens = torch.zeros(1, prompt + answer, dtype=torch.int64)
    batch = BlockBatch.build(
        tokens, _mask(prompt, answer), range(1), shape, anchors=512, seed=0
    )  # fmt: skip
    rows = Rows.of(draft, prompt, answer)
    assert rows.tokens == batch.tokens.numel()
    assert rows.run == 4 * len(batch.anchor_tokens)
    assert rows.judged == len(batch.block_rows)
    assert rows.targets == len(batch.target_rows)
    assert rows.pairs == int((4 * (batch.positions + 4)).sum())


def test_an_unrolled_drafts_flop_are_those_that_the_gpu_model_counts() -> None:
    """Which a FLOP counter has checked (test_benchmarks.py)."""
    problem = Problem(
        hidden=64, intermediate=128, heads=4, kv_heads=2, vocab=90, draft_vocab=50, seq=70, batch=1,
        mask_fraction=0.5,
    )  # fmt: skip
    draft = Draft.of(EAGLE3)
    found = step_flop(SIZES, draft, Rows.of(draft, 36, 34))
    expected = product_flop(problem, narrow=True)
    assert found["fc"] == expected["fc"]
    assert found["layers"] == expected["layer products"]
    assert found["head"] == expected["head"] and found["teacher"] == expected["teacher"]


def counted_products(rank: int, world: int) -> list[int]:
    """FLOP of a step's matrix products, attention's left out, of DFlash and DSpark."""
    megatron_parallel()
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.block_step import build
    from megatron_eagle.platform.cpu import products

    products.onednn_is_faster = lambda: False  # the counter does not know oneDNN's operator
    found = []
    for next_token in (False, True):
        forward, _ = build(dataclasses.replace(BLOCK, next_token=next_token))
        forward().backward()
        with FlopCounterMode(display=False) as counter:
            forward().backward()
        counted = counter.get_flop_counts()["Global"]
        found.append(sum(n for op, n in counted.items() if "mm" in str(op)))
    return found


def test_a_block_drafts_flop_are_those_that_a_counter_counts() -> None:
    (found,) = run_distributed(counted_products, 1)
    for next_token, counted in zip((False, True), found, strict=True):
        problem = dataclasses.replace(BLOCK, next_token=next_token)
        draft = Draft(
            layers=problem.layers, steps=problem.judged, block=problem.block, vocab=None,
            aux_layers=problem.aux, is_mtp=False, markov=problem.rank if next_token else 0,
        )  # fmt: skip
        anchors = problem.inputs().anchors
        targets = (anchors[:, None] + torch.arange(problem.judged)).unique()
        rows = Rows(
            tokens=int(targets[-1]) + 1, run=problem.block * len(anchors),
            judged=problem.judged * len(anchors), targets=len(targets), pairs=0,
        )  # fmt: skip
        assert sum(step_flop(SIZES, draft, rows).values()) == pytest.approx(counted, rel=0.01)


def test_a_count_that_does_not_exist_is_refused() -> None:
    for flags in ({"--eagle-algorithm": "p-eagle"}, {"--eagle-anchors": "8"}):
        with pytest.raises(ValueError, match="no count"):
            Draft.of(flags)


def test_equal_flop_are_as_many_answers_as_take_them(tmp_path: Path) -> None:
    assert matched_iterations(300, 50.0, 20.0) == 750
    assert matched_iterations(3, 1.0, 100.0) == 1
    (tmp_path / "eagle_base.json").write_text(
        json.dumps({
            "megatron_args": {
                "hidden_size": 576, "ffn_hidden_size": 1536, "num_attention_heads": 12,
                "kv_channels": 64, "num_query_groups": 4, "vocab_size": 49152, "num_layers": 30,
            }
        })
    )  # fmt: skip
    data = tmp_path / "answers.jsonl"
    lines = [{"prompt_ids": [0] * p, "answer_ids": [0] * a} for p, a in LENGTHS]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = argparse.Namespace(base=tmp_path, train_data=data, train_iters=40)
    runs = {run.name: run for run in runs_of(BLOCKS, args)}
    assert len(runs) == len(BLOCKS.variants) + len(BLOCKS.matched)
    assert BLOCKS.reference is not None
    reference = runs[BLOCKS.reference]
    assert reference.iterations == 40 and reference.flop is not None
    for name in BLOCKS.matched:
        run = runs[f"{name}, equal FLOP"]
        assert run.flop == runs[name].flop and run.flop is not None
        assert abs(run.flop * run.iterations - reference.flop * 40) <= run.flop / 2
    assert (
        runs["eagle3, equal FLOP"].iterations
        > 40
        > runs["dflash b4, 5 layers, equal FLOP"].iterations
    )


def test_answers_are_cut_and_those_without_a_supervised_token_left_out() -> None:
    answers = Answers([(10, 30), (38, 5), (50, 5)], seq_length=40)
    assert answers.lengths == [(10, 30), (38, 2)]


def test_a_resumed_training_counts_its_rows_once() -> None:
    lines = [(10, 100), (20, 210), (30, 300), (40, 390), (30, 90), (40, 180), (50, 270), (60, 95)]
    logged = [{"iteration": i, "supervised_rows": rows} for i, rows in lines]
    assert supervised_rows(logged) == 210 + 90 + 90 + 90 + 95


def test_a_block_is_one_pass_of_the_draft_and_a_chain_one_per_token(tmp_path: Path) -> None:
    report = {"accepted_length": 1.6, "acceptance": [0.3, 0.15, 0.1, 0.05], "equal_to_greedy": True}
    (tmp_path / "eval.json").write_text(json.dumps(report))
    line = {"iteration": 10, "supervised_rows": 900, "simulated_accepted_length": 1.5}
    (tmp_path / "curve.jsonl").write_text(json.dumps(line) + "\n")
    group = Group(
        variants={"chain": {}, "block": {"--eagle-block-size": "4", "--eagle-num-layers": None}},
        common={"--eagle-num-layers": "2"}, iterations=10, evaluation=(),
    )  # fmt: skip
    results = {name: Result.read(tmp_path, group, name, 10, 2e11) for name in group.variants}
    assert results["chain"].passes_per_token == pytest.approx(4 / 1.6)
    assert results["block"].passes_per_token == pytest.approx(1 / 1.6)
    lines = table(results, BLOCK_COLUMNS).splitlines()
    assert lines[1] == "|---" * 8 + "|"
    assert lines[2] == "| chain | 1.600 | 1.550 | 0.30 0.15 0.10 0.05 | 2.50 | 10 | 900 | 2.0 |"
    assert results["block"].flags == "`--eagle-block-size 4`, no `--eagle-num-layers`"
