"""--eagle-warm-start: training goes on from an exported draft, in another layout too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_eagle.hf.draft.export import export_draft
from megatron_eagle.hf.draft.formats import FORMATS
from megatron_eagle.testing.harness import run_distributed
from tests.e2e.conftest import Inputs
from tests.e2e.launch import RECIPE, train
from tests.helpers.refused_flags import refusal

DRAFT = ["--eagle-draft-vocab-size", 32, "--eagle-num-layers", 2, "--eagle-aux-layers", 0, 2, 5]


@pytest.fixture(scope="module")
def first(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A folder with a draft of 12 iterations (``ckpt``) in two formats, and its last loss."""
    folder = tmp_path_factory.mktemp("first")
    run = train(
        1, folder / "log.jsonl", *inputs.flags, *DRAFT, "--train-iters", 12,
        "--save", folder / "ckpt", "--save-interval", 12,
    )  # fmt: skip
    assert run.returncode == 0, run.output[-3000:]
    for name in ("hf", "speculators"):
        export_draft(folder / "ckpt", folder / name, fmt=FORMATS[name])
    return folder, run.metrics[12]["loss"]


def test_training_goes_on_from_files_and_checkpoint_alike(
    first: tuple[Path, float], inputs: Inputs, tmp_path: Path
) -> None:
    """From the files and from the checkpoint alike; sizes and vocabulary need no flags."""
    folder, last = first
    losses = []
    for name, ranks in (("hf", 1), ("ckpt", 2)):
        run = train(
            ranks, tmp_path / f"{name}.jsonl", *inputs.flags, "--train-iters", 3,
            "--tensor-model-parallel-size", ranks, "--eagle-warm-start", folder / name,
            "--save", tmp_path / name, "--save-interval", 3,
        )  # fmt: skip
        assert run.returncode == 0, run.output[-3000:]
        assert "starting from the draft in" in run.output
        losses.append([run.metrics[i]["loss"] for i in (1, 2, 3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] < 1.03 * last
    export_draft(tmp_path / "hf", tmp_path / "again")
    before, after = (
        load_file(d / "model.safetensors") for d in (folder / "hf", tmp_path / "again")
    )
    assert before["d2t"].equal(after["d2t"])
    assert set(before) == set(after) and not before["fc.weight"].equal(after["fc.weight"])
    assert (before["fc.weight"] - after["fc.weight"]).abs().max() < 0.05
    assert torch.isfinite(after["fc.weight"]).all()


REFUSED = [
    (["--eagle-draft-vocab-size", 40], "--eagle-draft-vocab-size 40: the draft of"),
    (["--eagle-num-experts", 4], "--eagle-num-experts 4: the draft of"),
    (["--eagle-num-layers", 1], "--eagle-num-layers 1: the draft of"),
    (["--eagle-aux-layers", 0, 2, 4], "reads aux layers [0, 2, 5], not [0, 2, 4]"),
    (["--eagle-vocab-map", "map.safetensors"], "brings its own"),
    (["--eagle-warm-start", "absent"], "--eagle-warm-start absent: no such checkpoint directory"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_flags_that_contradict_the_draft_are_refused(
    words: list, message: str, first: tuple[Path, float], inputs: Inputs
) -> None:
    given = [*RECIPE, *inputs.flags, "--eagle-warm-start", first[0] / "speculators", *words]
    (error,) = run_distributed(refusal, 1, [str(word) for word in given])
    assert message in error and "\n" not in error
