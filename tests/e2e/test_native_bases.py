"""Bases that Megatron's own trainer saved, in another layout than it trained them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import loss_compare
from megatron_eagle.checkpoint.base_description import read_base
from megatron_eagle.cli.main import main
from megatron_eagle.errors import UserError
from megatron_eagle.parallel.context import ContextShard
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.e2e.launch import ROOT, launch, train
from tests.helpers.native_base import BRIDGE, FAMILIES, Trained, pretrain
from tests.helpers.native_files import as_bridge, as_older
from tests.helpers.random_answers import write_answers

CAPTURED = (0, 3, 5)
HYBRIDS = {"hybrid": (0, 1, 2), "delta_net": (0, 1, 3), "latent_hybrid": (0, 1)}
"""Captured layers of hybrid models: of pairs, a mixer and an MLP or experts."""
WHOLE, TENSOR, PIPELINE, EXPERT, CONTEXT = {}, {"tp": 2}, {"pp": 2}, {"ep": 2}, {"cp": 2}
OTHER_LAYOUTS: dict[str, list[dict[str, int]]] = {
    "llama": [PIPELINE],
    "gpt2": [TENSOR],
    "mixtral": [TENSOR, WHOLE],
    "deepseek": [TENSOR, EXPERT],
    "hybrid": [PIPELINE, TENSOR],
    "delta_net": [TENSOR, CONTEXT],
    "heterogeneous": [PIPELINE, WHOLE],
    "latent_hybrid": [TENSOR],
}


MLA = ["--eagle-attention", "mla"]
AUX = "--eagle-aux-layers"
FLAGS: dict[str, list[object]] = {
    "deepseek": MLA,
    "llama": ["--eagle-init-from-base"],
    "heterogeneous": ["--eagle-init-from-base"],
    "hybrid": ["--eagle-init-from-base", AUX, 0, 1, 2],
    "delta_net": [AUX, 0, 1, 3],
    "latent_hybrid": [AUX, 0, 1],
}
TP2 = ["--tensor-model-parallel-size", 2]


@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "llama")],
)
def test_a_base_that_megatron_trained(family: str, tmp_path: Path) -> None:
    """Logits and captured states equal those of the model that trained, at another layout; a draft
    trains, converts, and decodes what the base alone would write. The base's files stay, and those
    of an older release or of Megatron-Bridge say and do the same."""
    trained = pretrain(family, tmp_path)
    before = listing(trained.directory)
    captured = HYBRIDS.get(family, CAPTURED)
    for layout in OTHER_LAYOUTS.get(family, [WHOLE, TENSOR]):
        world = 2 if layout else 1
        results = run_distributed(
            outputs, world, trained.directory, trained.tokens, layout, captured
        )
        check(results, trained, captured, 2 if family in HYBRIDS else 1)
    older = as_older(trained.directory, tmp_path / "older")
    same = older
    if family == "llama":
        same = as_bridge(older, tmp_path / "bridge", BRIDGE)
        with pytest.raises(UserError, match="is missing; name one of its iterations, such as iter"):
            read_base(tmp_path / "bridge")
    for other in (older, same):
        assert identity(other) == identity(trained.directory)
    write_answers(tmp_path / "answers.jsonl")
    flags = FLAGS.get(family, [])
    run = train(
        1, tmp_path / "log.jsonl", "--eagle-base-checkpoint", older,
        "--eagle-train-data", tmp_path / "answers.jsonl", "--eagle-draft-vocab-size", 32,
        "--save", tmp_path / "draft", "--save-interval", 20, *flags,
    )  # fmt: skip
    assert run.returncode == 0, run.output[-3000:]
    assert run.metrics[20]["loss"] < run.metrics[1]["loss"]
    prompts = [{"prompt_ids": row.tolist()} for row in trained.tokens[:, :7]]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    decoded = launch(
        ROOT / "tools" / "eval_acceptance.py", 2, "--base", same,
        "--draft", tmp_path / "draft", "--prompts", tmp_path / "prompts.jsonl",
        "--max-new-tokens", 12,
    )  # fmt: skip
    assert decoded.returncode == 0, decoded.output[-3000:]
    assert "speculative answers equal the greedy ones" in decoded.output
    converted = launch(
        ROOT / "tools" / "convert_to_hf.py", 1, "--load", tmp_path / "draft",
        "--output", tmp_path / "draft_hf", "--verify",
    )  # fmt: skip
    assert converted.returncode == 0, converted.output[-3000:]
    card = (tmp_path / "draft_hf" / "README.md").read_text()
    assert "Megatron-LM checkpoint, iteration 4" in card
    assert listing(trained.directory) == before


def identity(directory: Path) -> tuple[Any, ...]:
    """What tells a base from others, whoever saved it."""
    base = read_base(directory)
    return base.megatron_args, base.hf_config, base.rope, base.fingerprint


def listing(directory: Path) -> dict[str, int]:
    """The files under ``directory``, with the times at which they changed."""
    return {str(f): f.stat().st_mtime_ns for f in directory.rglob("*")}


def check(
    results: list[dict[str, Any]], trained: Trained, captured: tuple[int, ...], step: int
) -> None:
    """``step``: Megatron's layers in a layer of the base."""
    for result in results:
        positions = result["positions"]
        for layer, hidden in result["layers"].items():
            expected = trained.layers[step * layer + step - 1][positions]
            torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
        if "logits" in result:
            expected = trained.logits[:, positions]
            torch.testing.assert_close(result["logits"], expected, rtol=1e-5, atol=1e-5)
    assert any("logits" in result for result in results)
    assert {layer for result in results for layer in result["layers"]} == set(captured)


@torch.no_grad()
def outputs(
    rank: int,
    world: int,
    directory: Path,
    tokens: Tensor,
    layout: dict[str, int],
    captured: tuple[int, ...],
) -> dict[str, Any]:
    """This rank's captured layers and, on the last stage, the logits over the whole vocabulary, at
    the positions of this context-parallel rank."""
    groups = megatron_parallel(**layout)
    from megatron_eagle.decode.load import load_base

    info = read_base(directory)
    base = load_base(directory, info, groups, captured)
    hidden = None
    if groups.pp.rank() > 0:
        hidden = torch.empty(tokens.shape[1], len(tokens), info.megatron_args["hidden_size"])
        torch.distributed.recv(hidden, 0)
    layers, final = base.run_stage(tokens, hidden)
    length = tokens.shape[1]
    positions = ContextShard.of(length, groups.cp).take(torch.arange(length), 0)
    if groups.pp.rank() < groups.pp.size() - 1:
        torch.distributed.send(final.contiguous(), 1)
        return {"layers": layers, "positions": positions}
    logits = final @ base.output_weight.t()
    parts = [torch.empty_like(logits) for _ in range(groups.tp.size())]
    torch.distributed.all_gather(parts, logits.contiguous(), group=groups.tp)
    whole = torch.cat(parts, -1)[..., : info.vocab_size]
    return {"layers": layers, "positions": positions, "logits": whole.transpose(0, 1)}


@pytest.mark.slow
def test_a_native_base_serves_every_way_of_training(tmp_path: Path) -> None:
    """Features that another layout wrote train as the base beside the draft does; documents pack
    with learned positions that restart, beside a checkpoint that a file describes; a trained draft
    is a warm start."""
    trained = pretrain("gpt2", tmp_path)
    write_answers(tmp_path / "answers.jsonl")
    data = ["--eagle-train-data", tmp_path / "answers.jsonl"]
    base = ["--eagle-base-checkpoint", trained.directory, "--eagle-draft-vocab-size", 32]
    extracted = launch(
        ROOT / "tools" / "extract_features.py", 2, "--base", trained.directory,
        "--data", tmp_path / "answers.jsonl", "--output", tmp_path / "features",
        "--seq-length", 32, "--pipeline-model-parallel-size", 2,
    )  # fmt: skip
    assert extracted.returncode == 0, extracted.output[-3000:]
    features = ["--eagle-offline-features", tmp_path / "features"]
    saved = ["--save", tmp_path / "draft", "--save-interval", 20]
    beside = train(2, tmp_path / "beside.jsonl", *base, *data, *TP2, *saved)
    offline = train(2, tmp_path / "offline.jsonl", *base, *features, *TP2)
    described, mute = tmp_path / "base.json", as_older(trained.directory, tmp_path / "mute")
    assert main(["describe-base", str(mute), "--write", str(described)]) == 0
    torch.save({"iteration": 4}, next(mute.glob("iter_*/common.pt")))
    description = ["--eagle-base-checkpoint", mute, "--eagle-base-description", described]
    packed = train(1, tmp_path / "packed.jsonl", *base, *data, "--eagle-pack", *description)
    warm = train(1, tmp_path / "warm.jsonl", *base, *data, "--eagle-warm-start", tmp_path / "draft")
    for run in (beside, offline, packed, warm):
        assert run.returncode == 0, run.output[-3000:]
        assert run.metrics[20]["loss"] < beside.metrics[1]["loss"]
    for iteration, line in beside.metrics.items():
        assert offline.metrics[iteration]["loss"] == pytest.approx(line["loss"], rel=1e-5)
    assert warm.metrics[1]["loss"] < beside.metrics[10]["loss"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_layouts_agree_beside_a_native_base(tmp_path: Path) -> None:
    trained = pretrain("gpt2", tmp_path)
    layouts = ["--layouts", "tp1,pp2", "--base", str(trained.directory), "--seq-length", "32"]
    assert loss_compare.main([*layouts, "--train-iters", "3", "--draft-vocab-size", "32"]) == 0


@pytest.mark.slow
def test_a_gpt_and_the_same_model_as_a_hybrid_train_the_same_draft(tmp_path: Path) -> None:
    """Megatron itself loads the GPT's weights into a HybridModel and saves them as that."""
    gpt = pretrain("llama", tmp_path / "gpt")
    hybrid = pretrain(
        "llama", tmp_path / "hybrid", f"--hybrid-layer-pattern={'*-' * 8}", "--load",
        gpt.directory, "--finetune", "--no-load-optim", "--no-load-rng", "--lr", "1e-30",
    )  # fmt: skip
    torch.testing.assert_close(hybrid.logits, gpt.logits, rtol=1e-5, atol=1e-5)
    write_answers(tmp_path / "answers.jsonl")
    data = ["--eagle-train-data", tmp_path / "answers.jsonl", "--eagle-draft-vocab-size", 32]
    runs = [
        train(
            1, tmp_path / f"{kind}.jsonl", "--eagle-base-checkpoint", base.directory, *data,
            "--save", tmp_path / kind, "--save-interval", 20,
        )
        for kind, base in (("gpt", gpt), ("hybrid", hybrid))
    ]  # fmt: skip
    for run in runs:
        assert run.returncode == 0, run.output[-3000:]
    for iteration, line in runs[0].metrics.items():
        assert runs[1].metrics[iteration]["loss"] == pytest.approx(line["loss"], rel=1e-6)
    assert runs[0].metrics[20]["loss"] < runs[0].metrics[1]["loss"]
    resumed = train(
        1, tmp_path / "resumed.jsonl", "--eagle-base-checkpoint", hybrid.directory, *data,
        "--load", tmp_path / "hybrid", "--train-iters", 22, "--override-opt-param-scheduler",
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.output[-3000:]
    assert resumed.metrics[22]["loss"] < runs[1].metrics[10]["loss"]
