"""Is a step right on this device? Against the oracle of the tests, which shares no code with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_cases import Run, implementations
from benchmarks.gpu_report import Report
from benchmarks.problem import Problem

LOSS, COSINE = 0.01, 0.99
"""How far a loss may be off, and how alike gradients must be, in bf16 too."""


def check_correctness(report: Report, problem: Problem, device: str) -> bool:
    """Compare losses and head gradients with the oracle, in bf16 and fp32: whole sequences, half
    masked, packed; in bf16 of every variant of ours. Returns whether all are right."""
    kinds = {
        "whole": problem,
        "half masked": dataclasses.replace(problem, mask_fraction=0.5),
        "packed": dataclasses.replace(problem, documents=4),
    }
    right = True
    for kind, case in kinds.items():
        loss, gradient = oracle(case)
        for dtype in ("bf16", "fp32"):
            runs = implementations(dataclasses.replace(case, dtype=dtype), device)
            for name, run in runs.items():
                is_variant = name != "ours" and (dtype == "fp32" or "compiled" in name)
                if is_variant or "ModelOpt" in name:
                    continue
                found = compare(run(), loss, gradient)
                report.say(f"{name}: {kind}, {dtype}", **found)
                right = right and found["right"]
    return right


def compare(run: Run, loss: Tensor, gradient: Tensor) -> dict[str, Any]:
    """Run a step; compare its loss and its head's gradient with the expected ones."""
    forward, resting = run
    ours = forward()
    ours.backward()
    off = abs(float(ours.detach()) / float(loss) - 1)
    (head,) = [x for x in resting if x.shape == gradient.shape and x.requires_grad]
    found = head.grad if head.grad is not None else head.main_grad  # type: ignore[attr-defined]
    similarity = torch.nn.functional.cosine_similarity(
        found.float().flatten().cpu(), gradient.flatten(), dim=0
    )
    ratio = float(found.float().norm()) / float(gradient.norm())
    return {
        "right": off < LOSS and float(similarity) > COSINE and abs(ratio - 1) < 2 * LOSS,
        "loss_off_by": off,
        "head_gradient_cosine": float(similarity),
        "head_gradient_norm_ratio": ratio,
    }


def oracle(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the loss and the head's gradient in fp32, every document alone."""
    from tests.reference.eagle3 import ReferenceConfig, ReferenceEagle3

    inputs = problem.inputs()
    config = ReferenceConfig(
        hidden_size=problem.hidden, target_hidden_size=problem.hidden,
        intermediate_size=problem.intermediate, num_heads=problem.heads,
        num_kv_heads=problem.kv_heads, head_dim=problem.head_dim, vocab_size=problem.vocab,
        draft_vocab_size=problem.draft_vocab, num_aux=problem.aux, ttt_steps=problem.ttt,
        rms_eps=1e-5,
    )  # fmt: skip
    reference = ReferenceEagle3(config, inputs.embedding, inputs.vocab_ids)
    reference.load_state_dict(problem.weights(), strict=False)
    logits = inputs.final_hidden @ inputs.output_weight.t()
    positions = problem.positions()
    starts = [0] if positions is None else (positions[0] == 0).nonzero()[:, 0].tolist()
    parts = [
        reference.forward_ttt(*(x[:, a:b] for x in (inputs.aux, inputs.tokens, logits, mask)))
        for mask in [inputs.loss_mask]
        for a, b in pairwise([*starts, problem.seq])
    ]
    weights = config.step_decay ** torch.arange(problem.ttt)
    summed = torch.stack([(weights * part["loss_sums"]).sum() for part in parts]).sum()
    loss = summed / torch.stack([part["counts"][0] for part in parts]).sum()
    loss.backward()
    gradient = reference.lm_head.weight.grad
    assert gradient is not None
    return loss.detach(), gradient


def check_no_synchronisation(report: Report, forward: Callable[[], Tensor]) -> None:
    """Run a step that must not ask the device for anything; raise where it does."""
    forward().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    report.say("synchronisations", found=0)
