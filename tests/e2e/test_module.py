"""A base's own next-token module by command: trained, resumed, measured, converted, stitched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_eagle.hf.base.import_base import import_base
from tests.e2e.conftest import Inputs
from tests.e2e.launch import Run, launch, train
from tests.helpers.module_base import make_module_base, tensors_of

COMMAND = Path(__file__).parent / "command.py"
EXPERTS = ["--tensor-model-parallel-size", 2, "--sequence-parallel"]


def command(*words: object) -> str:
    run = launch(COMMAND, 1, *words)
    assert run.returncode == 0, run.output[-3000:]
    return run.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout"),
    [("deepseek_v3", EXPERTS), ("mimo", []), ("qwen3_next", EXPERTS), ("qwen3_5", EXPERTS)],
)
def test_from_the_base_s_files_to_a_copy_with_the_trained_module(
    kind: str, layout: list[object], inputs: Inputs, tmp_path: Path
) -> None:
    hf, base = tmp_path / "base_hf", tmp_path / "base"
    make_module_base(hf, kind)
    import_base(hf, base)
    data = Inputs(hf, base, inputs.answers)
    words = [*data.flags, "--eagle-algorithm", "mtp", "--train-iters", 14, *layout]
    draft = tmp_path / "draft"

    def trained(*more: object) -> Run:
        run = train(2, tmp_path / "log.jsonl", *words, "--lr", "1e-3", *more)
        assert run.returncode == 0, run.output[-3000:]
        return run

    start = ["--eagle-warm-start", hf, "--exit-interval", 12]
    whole = trained(*start, "--save", draft, "--save-interval", 12)
    assert whole.metrics[12]["loss"] < whole.metrics[1]["loss"]
    resumed = trained("--load", draft)
    assert resumed.metrics[13]["loss"] < whole.metrics[1]["loss"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": [i, 9, i + 3]}) + "\n" for i in range(5)))
    figures = command(
        "eval", "--base", base, "--draft", draft, "--prompts", prompts, "--max-new-tokens", 8
    )
    assert "speculative answers equal the greedy ones" in figures
    module, copy = tmp_path / "module", tmp_path / "copy"
    out = command("convert", "--load", draft, "--output", module, "--verify")
    assert "verified: all tensors equal" in out
    assert "megatron-eagle stitch" in (module / "README.md").read_text()
    command("stitch", "--hf", hf, "--module", module, "--save", copy)
    found, before = tensors_of(copy), tensors_of(hf)
    changed = {name for name, tensor in found.items() if not tensor.equal(before[name])}
    new = tensors_of(module)
    assert changed == {name for name in new if not new[name].equal(before[name])}
    assert all(found[name].equal(new[name]) for name in changed)
    assert any("mlp" in name for name in changed) and not any(".gate." in n for n in changed)
    again = command("import-draft", "--hf", copy, "--base", base, "--save", tmp_path / "again")
    assert "draft of 1 layer(s)" in again


@pytest.mark.slow
def test_from_random_weights_beside_a_base_without_a_module(inputs: Inputs, tmp_path: Path) -> None:
    words = [*inputs.flags, "--eagle-algorithm", "mtp"]
    draft = tmp_path / "draft"
    run = train(
        2, tmp_path / "log.jsonl", *words, "--save", draft, "--save-interval", 20,
        "--pipeline-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 3,
    )  # fmt: skip
    assert run.returncode == 0, run.output[-3000:]
    assert run.metrics[20]["loss"] < run.metrics[1]["loss"]
    refused = launch(COMMAND, 1, "convert", "--load", draft, "--output", tmp_path / "hf")
    assert "a llama base has no next-token module" in refused.error_line
    for more, reason in {
        ("--eagle-num-experts", 4): "--eagle-num-experts 4: an mtp draft is a layer of the base's",
        ("--eagle-draft-vocab-size", 9): "--eagle-algorithm mtp shares the base's whole output",
        ("--eagle-init-from-base",): "mtp starts as the base's own module by --eagle-warm-start",
        ("--eagle-warm-start", inputs.hf): "incomplete draft, fc.weight",
    }.items():
        assert reason in train(1, None, *words, *more).error_line
