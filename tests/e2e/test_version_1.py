"""A draft saved with metadata version 1 stays usable: converted, evaluated, warm-started, resumed.

tests/data/draft_v1/README.md says how the draft and the expected figures were made.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_eagle.errors import UserError
from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.hf.draft.card import algorithm_name
from megatron_eagle.hf.draft.export import export_draft
from megatron_eagle.hf.draft.info import parse_draft_info
from tests.e2e.launch import ROOT, Run, launch, train
from tests.helpers.trained_draft import metadata_tensor

DATA = ROOT / "tests" / "data" / "draft_v1"
EXPECTED: dict[str, Any] = json.loads((DATA / "expected.json").read_text())
TRAINED_WITH = [
    *("--eagle-aux-layers", 0, 1, 2, "--eagle-draft-vocab-size", 24, "--eagle-ttt-steps", 3),
    *("--train-iters", 32, "--lr", "2e-2", "--seq-length", 32),
]


@dataclass(frozen=True)
class Version1:
    """A Megatron base and the old draft's checkpoint, unpacked."""

    base: Path
    draft: Path

    @property
    def flags(self) -> list[object]:
        return [
            "--eagle-base-checkpoint", self.base, "--eagle-train-data", DATA / "answers.jsonl"
        ]  # fmt: skip


@pytest.fixture(scope="module")
def version_1(tmp_path_factory: pytest.TempPathFactory) -> Version1:
    folder = tmp_path_factory.mktemp("version_1")
    import_base(DATA / "base_hf", folder / "base")
    with tarfile.open(DATA / "draft.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return Version1(folder / "base", folder / "draft")


def assert_losses(run: Run, expected: dict[str, float]) -> None:
    assert run.returncode == 0, run.output[-3000:]
    losses = {str(iteration): line["loss"] for iteration, line in run.metrics.items()}
    assert losses == pytest.approx(expected, rel=1e-5)


def test_it_converts_to_the_same_tensors(version_1: Version1, tmp_path: Path) -> None:
    export_draft(version_1.draft, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    digests = {
        name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }
    assert digests == EXPECTED["sha256"]
    config, before = (
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path / "hf", DATA / "exported")
    )
    assert config == before


def test_it_evaluates_to_the_same_accepted_length(version_1: Version1, tmp_path: Path) -> None:
    run = launch(
        ROOT / "tools" / "eval_acceptance.py", 1, "--base", version_1.base,
        "--draft", version_1.draft, "--prompts", DATA / "prompts.jsonl", "--max-new-tokens", 12,
        "--output", tmp_path / "figures.json",
    )  # fmt: skip
    assert run.returncode == 0, run.output[-3000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {name: figures[name] for name in EXPECTED["evaluation"]} == EXPECTED["evaluation"]


def test_it_resumes_with_its_optimizer(version_1: Version1, tmp_path: Path) -> None:
    words = [*version_1.flags, *TRAINED_WITH, "--load", version_1.draft]
    run = train(1, tmp_path / "log.jsonl", *words)
    assert_losses(run, EXPECTED["resumed"])


@pytest.mark.parametrize("source", ["draft", "exported"])
def test_training_starts_from_its_weights(source: str, version_1: Version1, tmp_path: Path) -> None:
    """From the checkpoint and from what was exported of it; sizes and vocabulary need no flags."""
    run = train(
        1, tmp_path / "log.jsonl", *version_1.flags, "--train-iters", 2, "--seq-length", 32,
        "--eagle-ttt-steps", 3,
        "--eagle-warm-start", version_1.draft if source == "draft" else DATA / source,
    )  # fmt: skip
    assert_losses(run, EXPECTED["warm_start"][source])


KINDS = [
    ("eagle1", "EAGLE-1", (), 61, 1),
    ("eagle3.1", "EAGLE-3.1", (0, 1, 2), 24, 1),
    ("p-eagle", "P-EAGLE", (0, 1, 2), 61, 2),
    ("mla", "EAGLE-3", (0, 1, 2), 24, 1),
    ("moe", "EAGLE-3", (0, 2, 3), 61, 1),
]


@pytest.mark.parametrize(("kind", "algorithm", "aux_layers", "vocab", "layers"), KINDS)
def test_metadata_of_every_kind_of_draft_are_read(
    kind: str, algorithm: str, aux_layers: tuple[int, ...], vocab: int, layers: int
) -> None:
    content = json.loads((DATA / f"metadata_{kind}.json").read_text())
    assert content["version"] == 1
    info = parse_draft_info(metadata_tensor(content), kind)
    assert algorithm_name(info) == algorithm
    assert (info.aux_layers, info.draft_vocab_size) == (aux_layers, vocab)
    assert (info.num_layers, info.ttt_steps) == (layers, content["ttt_steps"])


def test_missing_fields_are_named() -> None:
    content = json.loads((DATA / "metadata_mla.json").read_text())
    for name in ("draft_vocab_size", "config"):
        rest = {key: value for key, value in content.items() if key != name}
        with pytest.raises(UserError, match=f"{name} is missing"):
            parse_draft_info(metadata_tensor(rest), "draft")
