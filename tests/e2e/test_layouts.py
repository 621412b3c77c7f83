"""Checkpoints reshard between pipeline and tensor parallelism, optimizer included."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_eagle.hf.base.import_base import import_base
from tests.e2e.conftest import Inputs
from tests.e2e.launch import train
from tests.helpers.tiny_hf import make_base

pytestmark = pytest.mark.slow
PP2 = ["--pipeline-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 3]
TP2 = ["--tensor-model-parallel-size", 2]


@pytest.mark.parametrize(("saved", "loaded"), [(PP2, TP2), (TP2, PP2), (PP2, [])], ids=str)
def test_resuming_in_another_layout_goes_on_alike(
    saved: list, loaded: list, tmp_path: Path, inputs: Inputs
) -> None:
    """Optimizer state included, with the distributed optimizer's reshardable format."""
    flags = [*inputs.flags, "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable",
             "--adam-eps", "1e-5"]  # fmt: skip
    save = ["--save", tmp_path / "draft", "--save-interval", 10]
    whole = train(2, tmp_path / "whole.jsonl", *flags, *saved, *save)
    assert whole.returncode == 0, whole.output[-3000:]
    load = ["--load", tmp_path / "draft", "--ckpt-step", 10]
    rest = train(2 if loaded else 1, tmp_path / "rest.jsonl", *flags, *loaded, *load)
    assert rest.returncode == 0, rest.output[-3000:]
    assert sorted(rest.metrics) == list(range(11, 21))
    for iteration, line in rest.metrics.items():
        for key in ("loss", "grad_norm", "learning_rate"):
            assert line[key] == pytest.approx(whole.metrics[iteration][key], rel=1e-5), key


@pytest.mark.parametrize("kind", ["head-norms", "mla"])
def test_gradients_of_query_norms_are_summed_once(
    kind: str, tmp_path: Path, inputs: Inputs
) -> None:
    """Megatron finds such norms by their names: of heads, each rank has a part of the gradient; of
    an MLA draft's low rank every rank has all of it. Neither is seen under sequence parallelism."""
    flags = [*inputs.flags, "--eagle-qk-layernorm"]
    if kind == "mla":
        make_base(tmp_path / "hf", "deepseek_v3", num_hidden_layers=7)
        import_base(tmp_path / "hf", tmp_path / "base")
        data = ["--eagle-train-data", inputs.answers, "--eagle-attention", "mla"]
        flags = ["--eagle-base-checkpoint", tmp_path / "base", *data]
    few = ["--train-iters", 3, "--lr-decay-iters", 20, "--adam-eps", "1e-5"]
    save = ["--save", tmp_path / "draft", "--save-interval", 1]  # layouts draw other weights
    first = train(1, None, *flags, *few, "--train-iters", 1, *save)
    assert first.returncode == 0, first.output[-3000:]
    start = ["--eagle-warm-start", tmp_path / "draft"]
    alone, halves = (
        train(ranks, tmp_path / f"{ranks}.jsonl", *flags, *few, *start, *layout)
        for ranks, layout in ((1, []), (2, TP2))
    )
    assert halves.returncode == 0, halves.output[-3000:]
    assert sorted(alone.metrics) == [1, 2, 3], alone.output[-3000:]
    for iteration, line in halves.metrics.items():
        for key in ("loss", "grad_norm"):
            expected = alone.metrics[iteration][key]
            assert line[key] == pytest.approx(expected, rel=3e-5), (key, iteration)
