"""Flags that training cannot honour: refused before anything is built, each in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_eagle.testing.harness import run_distributed
from tests.e2e.conftest import Inputs
from tests.e2e.launch import RECIPE
from tests.helpers.refused_flags import refusal

SELECTIVE = ["--recompute-granularity", "selective", "--recompute-modules"]
REFUSED = [
    (["--eagle-aux-layers", 2, 2], "--eagle-aux-layers names a layer twice"),
    (["--eagle-aux-layers", 1, 7], "--eagle-aux-layers 7 is out of range"),
    (["--eagle-draft-vocab-size", 62], "--eagle-draft-vocab-size 62 exceeds"),
    (["--seq-length", 4], "--seq-length 4 is too short"),
    (["--hidden-size", 64], "--hidden-size 64 contradicts the base checkpoint"),
    (
        ["--num-layers-per-virtual-pipeline-stage", 1],
        "--num-layers-per-virtual-pipeline-stage 1 is not supported: the base only runs forward",
    ),
    (["--multi-latent-attention"], "--multi-latent-attention contradicts the base"),
    (["--reset-attention-mask"], "--reset-attention-mask is not supported"),
    (["--init-model-with-meta-device"], "--init-model-with-meta-device is not supported"),
    (
        ["--recompute-granularity", "full", "--recompute-method", "uniform"],
        "--recompute-granularity full is not supported",
    ),
    (
        [*SELECTIVE, "layernorm"],
        "--recompute-modules layernorm is not supported",
    ),
    (
        [*SELECTIVE, "mlp", "--eagle-num-experts", 4],
        "--recompute-modules mlp: a draft of --eagle-num-experts 4 has none",
    ),
    (["--eagle-attention", "mla"], "--eagle-attention mla: the base has no multi-latent"),
    (["--eagle-eval-prompts", "/absent.jsonl"], "--eagle-eval-prompts /absent.jsonl: no such file"),
    (["--eagle-eval-prompts", "TEXT"], ":1: holds text, which needs --tokenizer-type Hugging"),
    (
        ["--eagle-eval-prompts", "IDS", "--eagle-eval-new-tokens", 64],
        "prompt 0: 1 tokens and --eagle-eval-new-tokens 64 exceed the base's 64 positions",
    ),
]
PROMPTS = {"TEXT": {"prompt": "Hello"}, "IDS": {"prompt_ids": [1]}}


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_flags_are_refused_in_one_line(
    words: list, message: str, inputs: Inputs, tmp_path: Path
) -> None:
    for name, prompt in PROMPTS.items():
        (tmp_path / name).write_text(json.dumps(prompt) + "\n")
    words = [tmp_path / word if word in PROMPTS else word for word in words]
    line = [str(word) for word in [*RECIPE, *inputs.flags, *words]]
    (error,) = run_distributed(refusal, 1, line)
    assert message in error and "\n" not in error


def test_the_recipe_itself_is_accepted(inputs: Inputs) -> None:
    assert run_distributed(refusal, 1, [str(w) for w in [*RECIPE, *inputs.flags]]) == ["accepted"]
