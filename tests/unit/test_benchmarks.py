"""The benchmarks run, their baseline is right, and what they promise of memory holds."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import gpu, report
from benchmarks.floors import floor_ms, step_tera_flops
from benchmarks.gpu_attention import check_attention
from benchmarks.gpu_cases import LLAMA_1B, cases_of
from benchmarks.gpu_model import attention_flop, product_flop
from benchmarks.gpu_report import Report
from benchmarks.measure import _saved
from benchmarks.plain_modelopt import DECAY, PlainModelOpt
from benchmarks.problem import Problem
from megatron_eagle.attention import flash
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.reference.eagle3 import ReferenceConfig, ReferenceEagle3

ROOT = Path(__file__).resolve().parents[2]
TINY = Problem(
    hidden=32, intermediate=64, heads=4, kv_heads=2, vocab=90, draft_vocab=50, seq=24,
    mask_fraction=0.25,
)  # fmt: skip

LEFT_OUT = (
    "safetensors", "transformers", "tokenizers", "jinja2", "sentencepiece", "psutil", "yaml",
    "tensorboard",
)  # fmt: skip
BARE = (
    f"import sys; sys.modules.update(dict.fromkeys({LEFT_OUT})); "
    "from benchmarks import gpu; sys.exit(gpu.main())"
)
"""``benchmarks/gpu.py`` where only PyTorch and megatron-core are installed."""


def test_the_gpu_command_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BARE, "--device", "cpu", "--tiny", "--iters", "1"]
    done = subprocess.run(
        [*command, "--skip-compiled", "--report", tmp_path / "gpu.md"],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"right": true' in done.stdout
    assert '"right": false' not in done.stdout
    for name in ("plain ModelOpt before", "plain ModelOpt after"):
        assert done.stdout.count(f'"part": "{name}"') == 4
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("| ours |") == 5 and "no floor for this device" in text
    assert "## half masked" in text and "## packed documents" in text
    assert text.count("| ours, kernels for each document |") == 1
    assert text.count("| forward: unroll |") == 5 == text.count("## Profile: ")
    found = json.loads((tmp_path / "gpu.json").read_text())
    checks = [line for line in found["findings"] if "case" not in line]
    assert len(checks) == 2 * 4 + 2 * 3 + 3 * 3 + 1 and all(line["right"] for line in checks)
    assert len(found["findings"]) == len(checks) + 4 * 6 + 5
    for parts in found["parts"].values():
        whole = parts.pop("whole step")
        of_step = [ms for name, ms in parts.items() if not name.startswith("kind")]
        assert sum(of_step) == pytest.approx(whole) and min(of_step) > 0
        kinds = [ms for name, ms in parts.items() if name.startswith("kind")]
        assert sum(kinds) == pytest.approx(whole) and parts["kind: products"] > 0


def test_the_gpu_command_names_what_it_has_no_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "check_attention", lambda *_: True)
    monkeypatch.setattr(gpu, "check_correctness", lambda *_: True)
    monkeypatch.setattr(gpu, "check_no_synchronisation", mock.Mock(side_effect=AssertionError))
    found, cases = Report("NVIDIA H100 80GB HBM3", {}), cases_of(LLAMA_1B)
    args = gpu._parser().parse_args([])
    assert 1 < args.minutes < 20 and not gpu.Budget(args.minutes).is_over(gpu.FOR_CASES)
    assert not gpu.run_day(found, cases, args, gpu.Budget(0.0))
    text = found.markdown(cases)
    assert text.count("| 16 | left out: 0 minutes are over |") == len(found.findings)
    for part in ("ours", "plain ModelOpt before", "plain ModelOpt compiled", "profile"):
        assert text.count(f"| {part} | 16 |") == len(cases) - (part.startswith("plain"))


@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_the_gpu_command_finds_wrong_attention(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Report("CPU", {})
    run = getattr(flash, broken)
    monkeypatch.setattr(flash, broken, lambda *args: (run(*args)[0] * 1.05, *run(*args)[1:]))
    assert not check_attention(found, "cpu")
    assert not any(line["right"] for line in found.findings)


@pytest.mark.gpu
def test_the_flash_kernels_are_right() -> None:
    found = Report("cuda", {})
    assert check_attention(found, "cuda"), found.findings
    assert len(found.findings) == 2 * 4 + 3


@pytest.mark.parametrize(
    ("changes", "tera_flops", "floor"),
    [
        ({}, 216, 309),
        ({"draft_vocab": 32000}, 100, 143),
        ({"vocab": 32000, "draft_vocab": 32000}, 87, 124),
        ({"draft_vocab": 32000, "mask_fraction": 0.6}, 42, 60),
    ],
)
def test_floors_of_a_1b_base(changes: dict[str, Any], tera_flops: int, floor: int) -> None:
    problem = dataclasses.replace(LLAMA_1B, **changes)
    assert round(step_tera_flops(problem)) == tera_flops
    found = floor_ms(problem, "NVIDIA H100 80GB HBM3")
    assert found is not None and abs(found - floor) < 1
    assert floor_ms(problem, "a device of next year") is None


def test_floors_leave_out_what_masked_rows_and_other_documents_would_cost() -> None:
    problem = Problem(
        hidden=8, intermediate=8, heads=1, kv_heads=1, vocab=9, draft_vocab=5, seq=64, batch=2,
        ttt=2, mask_fraction=0.5,
    )  # fmt: skip
    packed = dataclasses.replace(problem, documents=4)
    per_pair = 2 * 2 * 7 * 8  # sequences, and FLOP of seven products of width 8
    # Steps 0 and 1 have the queries of rows 32 to 63; row r reads r + 1 rows, or its document's.
    assert attention_flop(problem, narrow=True) == 2 * sum(range(33, 65)) * per_pair
    assert attention_flop(problem, narrow=False) == 2 * sum(range(1, 65)) * per_pair
    assert attention_flop(packed, narrow=True) == 2 * 2 * sum(range(1, 17)) * per_pair
    parts = product_flop(problem, narrow=True)
    assert parts["teacher"] == 2 * 2 * 31 * 8 * 9, "the draft's columns are among the base's"
    whole = sum(parts.values()) + attention_flop(problem, narrow=True)
    assert step_tera_flops(problem) == pytest.approx(whole / 1e12)


def test_the_verdict_compares_the_fastest_of_ours() -> None:
    found = Report("NVIDIA H100 80GB HBM3", {"torch": "2"})
    common = {"case": "c", "batch": 16, "peak_mib": 1.0}
    for part, ms in (
        ("ours", 200.0),
        ("ours, compiled", 160.0),
        ("plain ModelOpt compiled", 320.0),
    ):
        found.say(part, wall_ms=ms, wall_ms_per_sequence=ms / 16, **common)
    found.say("plain ModelOpt before", case="c", batch=1, failed="OutOfMemoryError: no")
    text = found.markdown({"c": dataclasses.replace(LLAMA_1B, draft_vocab=32000)})
    assert "| ours, compiled | 16 | 160.0 | 1.12 |" in text
    assert "takes 2.00 times as long as ours (goal: 1.5)" in text
    assert "| plain ModelOpt before | 1 | OutOfMemoryError: no |" in text


@pytest.mark.parametrize("before", [False, True])
def test_the_plain_baseline_is_the_same_mathematics(before: bool) -> None:
    """Another layout, normalised per step, but the reference's losses and gradients."""
    config = ReferenceConfig(
        hidden_size=32, target_hidden_size=32, intermediate_size=64, num_heads=4, num_kv_heads=2,
        head_dim=8, vocab_size=90, draft_vocab_size=50, rms_eps=1e-5, step_decay=DECAY,
    )  # fmt: skip
    inputs = TINY.inputs()
    reference = ReferenceEagle3(config, inputs.embedding, inputs.vocab_ids)
    reference.load_state_dict(TINY.weights(), strict=False)
    logits = inputs.final_hidden @ inputs.output_weight.t()
    found = reference.forward_ttt(inputs.aux, inputs.tokens, logits, inputs.loss_mask)
    weights = DECAY ** torch.arange(TINY.ttt)
    expected = (weights * found["loss_sums"] / found["counts"]).sum()
    plain = PlainModelOpt(TINY, "cpu", before, compiled=False)
    loss = plain()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for part in (loss, expected):
        part.backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(
            plain.weights[name].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name
        )


def saved_bytes(rank: int, world: int) -> dict[tuple[int, int], int]:
    """What a step saves for backward, by (length, steps), without the vocabulary's share."""
    megatron_parallel()
    from benchmarks.draft_step import build

    found = {}
    for length, steps in [(64, 2), (128, 2), (256, 2), (64, 4), (64, 6)]:
        problem = dataclasses.replace(TINY, seq=length, ttt=steps, mask_fraction=0.0)
        forward, resting = build(problem, "cpu", {})
        found[length, steps] = _saved(forward, resting)
    return found


def masked_steps(rank: int, world: int) -> dict[float, tuple[int, int, int, int]]:
    """By masked fraction: what a step saves, its FLOP of matrix products, and what the arithmetic
    of the GPU model says of them, with and without narrowing."""
    megatron_parallel()
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.draft_step import build
    from benchmarks.gpu_model import product_flop
    from megatron_eagle.platform.cpu import products

    products.onednn_is_faster = lambda: False  # the counter does not know oneDNN's operator
    found = {}
    for fraction in (0.0, 0.6):
        problem = dataclasses.replace(TINY, hidden=64, seq=256, mask_fraction=fraction)
        forward, resting = build(problem, "cpu", {})
        forward().backward()
        with FlopCounterMode(display=False) as counter:
            forward().backward()
        counted = counter.get_flop_counts()["Global"]
        flop = sum(n for op, n in counted.items() if "mm" in str(op))
        parts = [product_flop(problem, narrow) for narrow in (True, False)]
        # Nor does it know addmm_, by which the head's gradient is summed.
        said = [round(sum(part.values()) - part["head"] / 3) for part in parts]
        found[fraction] = (_saved(forward, resting), flop, *said)
    return found


def losses_with_and_without_given_logits(rank: int, world: int) -> list[tuple[float, ...]]:
    megatron_parallel()
    from benchmarks.draft_step import build
    from benchmarks.given_logits import give_logits

    found = []
    for draft_vocab in (50, 90):
        forward, _ = build(dataclasses.replace(TINY, draft_vocab=draft_vocab), "cpu", {})
        plain = forward().item()
        logits = give_logits(forward.model, forward.batch)
        given = forward().item()
        with torch.no_grad():
            logits.mul_(2)
        found.append((plain, given, forward().item()))
    return found


def test_given_logits_give_the_same_loss() -> None:
    (found,) = run_distributed(losses_with_and_without_given_logits, 1)
    for plain, given, of_other_logits in found:
        assert given == pytest.approx(plain, rel=1e-6)
        assert of_other_logits != pytest.approx(plain, rel=1e-3)


def test_what_a_step_keeps_is_linear_in_length_and_steps() -> None:
    (found,) = run_distributed(saved_bytes, 1)
    by_length = found[256, 2] - found[128, 2], found[128, 2] - found[64, 2]
    assert by_length[0] == pytest.approx(2 * by_length[1], rel=0.02)
    assert found[64, 6] - found[64, 4] == pytest.approx(found[64, 4] - found[64, 2], rel=0.02)


def test_masked_rows_cost_neither_products_nor_memory() -> None:
    (found,) = run_distributed(masked_steps, 1)
    for _, flop, said, _ in found.values():
        assert flop == pytest.approx(said, rel=0.01)
    (all_saved, _, _, _), (saved, flop, _, every_row) = found[0.0], found[0.6]
    assert flop < 0.7 * every_row, "the layers would run every row"
    assert saved < 0.62 * all_saved, "40 % of the rows, and what step 0 keeps of all"


@pytest.mark.parametrize(
    ("peer", "loss"),
    # Steps' means of 4 and 3, the second over half of the rows; an entropy of 1 left out.
    [("specforge", 4 + 0.8 * 1.5), ("modelopt-eager", 4 + 0.8 * 3), ("speculators", 4 + 2.4 - 1)],
)
def test_the_report_fails_on_a_peers_other_loss(peer: str, loss: float) -> None:
    ours = {"case": "M", "implementation": "ours", "loss": 5.2, "loss_per_step": [4.0, 3.0]}
    theirs = {"case": "M", "implementation": peer, "loss": loss}
    if peer == "speculators":
        theirs["loss_offset"] = 1.0
    assert report._check_losses([ours, theirs]) == 0
    assert report._check_losses([ours, theirs | {"loss": loss * 1.001}]) == 1


@pytest.mark.gpu
def test_a_step_never_asks_the_device() -> None:
    from benchmarks.draft_step import build, start_megatron
    from benchmarks.gpu_checks import check_no_synchronisation

    with tempfile.TemporaryDirectory() as scratch:
        start_megatron(0, 1, f"{scratch}/store")
        problem = dataclasses.replace(TINY, hidden=64, seq=64, dtype="bf16")
        found = Report("cuda", {})
        check_no_synchronisation(found, build(problem, "cuda", {})[0])
        assert found.findings == [{"part": "synchronisations", "found": 0}]
        torch.distributed.destroy_process_group()
