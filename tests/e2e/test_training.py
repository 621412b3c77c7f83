"""Training through Megatron's pretrain(): layouts agree, runs resume, the base stays as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import Inputs
from tests.e2e.launch import ROOT, Run, torchrun, train

DRAFT = ["--eagle-draft-vocab-size", 32, "--eagle-ttt-steps", 3]


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """20 iterations at TP 2 that saved after 10 and 20, and their checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    run = train(
        2, folder / "log.jsonl", *inputs.flags, *DRAFT, "--tensor-model-parallel-size", 2,
        "--save", folder / "draft", "--save-interval", 10,
        script=ROOT / "tests" / "e2e" / "train_and_check_base.py", launcher=torchrun,
    )  # fmt: skip
    assert run.returncode == 0, run.output[-3000:]
    return run, folder / "draft"


def resume_at_10(checkpoint: Path, folder: Path) -> Path:
    copy = folder / "draft"
    shutil.copytree(checkpoint, copy)
    (copy / "latest_checkpointed_iteration.txt").write_text("10")
    return copy


def test_the_loss_falls_and_the_base_is_unchanged(whole: tuple[Run, Path]) -> None:
    run, checkpoint = whole
    assert run.output.count("THE BASE IS UNCHANGED") == 2
    assert run.metrics[20]["loss"] < 0.97 * run.metrics[1]["loss"]
    assert set(run.metrics) == set(range(1, 21))
    saved = sum(file.stat().st_size for file in (checkpoint / "iter_0000020").rglob("*"))
    assert saved < 1_500_000, "the draft alone, without the base"


@pytest.mark.parametrize("layout", ["tp2", "tp1", "tp2-sp"])
def test_ten_and_ten_iterations_equal_twenty(
    layout: str, whole: tuple[Run, Path], inputs: Inputs, tmp_path: Path
) -> None:
    """Resumed in the same layout bit by bit; in another to 1e-5."""
    run, checkpoint = whole
    ranks = 1 if layout == "tp1" else 2
    parallel = ["--tensor-model-parallel-size", ranks]
    parallel += ["--sequence-parallel"] if layout == "tp2-sp" else []
    resumed = train(
        ranks, tmp_path / "log.jsonl", *inputs.flags, *DRAFT, *parallel,
        "--load", resume_at_10(checkpoint, tmp_path), "--save", tmp_path / "out",
        "--save-interval", 1000,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.output[-3000:]
    assert set(resumed.metrics) == set(range(11, 21))
    tolerance = 0.0 if layout == "tp2" else 1e-5
    for iteration, line in resumed.metrics.items():
        for key in ("loss", "loss_0", "loss_2", "grad_norm", "learning_rate"):
            expected = run.metrics[iteration][key]
            assert line[key] == pytest.approx(expected, rel=tolerance, abs=0), (iteration, key)
        assert line["accuracy_0"] == run.metrics[iteration]["accuracy_0"]


@pytest.mark.slow
def test_a_finished_run_started_again_says_so_and_keeps_its_draft(
    whole: tuple[Run, Path], inputs: Inputs, tmp_path: Path
) -> None:
    """As schedulers do that start a job until it succeeds."""
    copy = tmp_path / "draft"
    shutil.copytree(whole[1], copy)
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    again = train(
        2, None, *inputs.flags, *DRAFT, "--tensor-model-parallel-size", 2,
        "--load", copy, "--save", copy, "--save-interval", 10, launcher=torchrun,
    )  # fmt: skip
    assert again.returncode == 0, again.output[-3000:]
    told = "nothing left to train: the checkpoint is at iteration 20 of --train-iters 20"
    assert again.output.count(told) == 1
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before


def test_data_parallel_ranks_share_the_work(inputs: Inputs, tmp_path: Path) -> None:
    """DP 2 sees the same global batches as DP 1: same losses from the same start."""
    runs = []
    for ranks in (1, 2):
        log = tmp_path / f"dp{ranks}.jsonl"
        runs.append(train(ranks, log, *inputs.flags, *DRAFT, "--train-iters", 5))
        assert runs[-1].returncode == 0, runs[-1].output[-3000:]
    for iteration, line in runs[0].metrics.items():
        assert line["loss"] == pytest.approx(runs[1].metrics[iteration]["loss"], rel=1e-5)
        assert line["supervised_rows"] == runs[1].metrics[iteration]["supervised_rows"]


@pytest.mark.slow
def test_compiling_and_recomputing_change_nothing(inputs: Inputs, tmp_path: Path) -> None:
    """--eagle-compile and --eagle-nvtx run without CUDA and give the same losses, and so does
    recomputing the draft's activations."""
    flags = [*inputs.flags, *DRAFT, "--train-iters", 3]
    # Compiling Megatron's own functions moves the generator that the draft starts from.
    plain = train(1, tmp_path / "a.jsonl", *flags, launcher=torchrun)
    fast = train(
        1, tmp_path / "b.jsonl", *flags, "--eagle-compile", "--eagle-nvtx",
        "--recompute-granularity", "selective", "--recompute-modules", "core_attn", "mlp",
        launcher=torchrun,
    )  # fmt: skip
    assert fast.returncode == 0, fast.output[-3000:]
    assert "could not be compiled" not in fast.output
    for iteration, line in plain.metrics.items():
        assert fast.metrics[iteration]["loss"] == pytest.approx(line["loss"], rel=1e-6)


def test_converted_draft_gives_the_same_logits(
    whole: tuple[Run, Path], inputs: Inputs, tmp_path: Path
) -> None:
    """The Hugging Face files alone, read by the reference, against the Megatron draft."""
    from safetensors.torch import load_file

    from megatron_eagle.hf.draft.export import export_draft
    from tests.e2e.megatron_draft import draft_logits
    from tests.reference.eagle3 import ReferenceEagle3

    _, checkpoint = whole
    export_draft(checkpoint, tmp_path / "hf")
    embedding = load_file(inputs.hf / "model.safetensors")["model.embed_tokens.weight"]
    reference = ReferenceEagle3.from_hf(tmp_path / "hf", embedding, ttt_steps=3)
    torch.manual_seed(0)
    tokens = torch.randint(embedding.shape[0], (2, 12))
    features = torch.randn(2, 12, reference.fc.weight.shape[1])
    expected = reference.forward_ttt(
        features, tokens, torch.zeros(2, 12, embedding.shape[0]), torch.ones(2, 12)
    )["logits"]
    found = draft_logits(checkpoint, embedding, tokens, features, steps=3)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
