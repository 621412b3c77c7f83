"""--eagle-init-from-base as a user gives it: every layout starts alike, resuming goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from megatron_eagle.hf.draft.export import export_draft
from tests.e2e.conftest import Inputs
from tests.e2e.launch import train

pytestmark = pytest.mark.slow

FLAGS = ["--eagle-init-from-base", "--eagle-draft-vocab-size", 40, "--eagle-num-layers", 2]
LAYOUTS = {
    "alone": (1, []),
    "tp2-sp": (2, ["--tensor-model-parallel-size", 2, "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 3]),
}


def weights(save: Path) -> dict[str, Tensor]:
    export_draft(save, save.parent / f"{save.name}_hf")
    return load_file(save.parent / f"{save.name}_hf" / "model.safetensors")


def test_every_layout_starts_alike(inputs: Inputs, tmp_path: Path) -> None:
    """Learning rate 0: what is saved is the start."""
    still = ["--lr", 0, "--min-lr", 0, "--weight-decay", 0, "--train-iters", 1]
    save_at_once = ["--save-interval", 1, "--save"]
    starts = []
    for name, (ranks, words) in LAYOUTS.items():
        save = tmp_path / name
        run = train(ranks, None, *inputs.flags, *FLAGS, *still, *words, *save_at_once, save)
        assert run.returncode == 0, run.output[-3000:]
        assert "starting from the base's last layers" in run.output
        starts.append(weights(save))
    base = load_file(inputs.hf / "model.safetensors")
    for found in starts:
        for i in range(2):
            for part in ("mlp.gate_proj", "self_attn.o_proj", "mlp.down_proj"):
                name = f"layers.{i}.{part}.weight"
                assert found[name].equal(base[f"model.layers.{5 + i}.{part}.weight"]), name
        for name, tensor in starts[0].items():
            # Norms of the embedding and nothing else start as a fresh draft's, which is all ones.
            assert found[name].equal(tensor), name


def test_resuming_starts_nothing_again(inputs: Inputs, tmp_path: Path) -> None:
    trained = train(
        1, tmp_path / "log.jsonl", *inputs.flags, *FLAGS, "--train-iters", 4,
        "--save", tmp_path / "trained", "--save-interval", 2,
    )  # fmt: skip
    assert trained.metrics[4]["loss"] < trained.metrics[1]["loss"], trained.output[-3000:]
    resumed = train(
        1, tmp_path / "resumed.jsonl", *inputs.flags, *FLAGS, "--train-iters", 4,
        "--load", tmp_path / "trained", "--ckpt-step", 2,
    )  # fmt: skip
    assert set(resumed.metrics) == {3, 4}, resumed.output[-3000:]
    for iteration, line in resumed.metrics.items():
        assert line["loss"] == trained.metrics[iteration]["loss"]
