"""Losses, accuracies and every gradient of the draft equal the reference's, in every TP layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.draft_fixture import Case, build_model, local_part, megatron_names
from tests.reference.eagle3 import ReferenceConfig, ReferenceEagle3

HIDDEN, LENGTH, BATCH = 32, 24, 2
TOLERANCE = 1e-5

CONFIG = ReferenceConfig(
    hidden_size=HIDDEN,
    target_hidden_size=HIDDEN,
    intermediate_size=64,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    vocab_size=61,  # divided by neither 2 nor 4
    draft_vocab_size=23,
    num_layers=1,
    num_aux=3,
    rope_theta=10000.0,
    rms_eps=1e-5,
    ttt_steps=3,
    step_decay=0.8,
    mask_out_of_vocab=False,
    detach_steps=False,
)


def make_case(seed: int = 0, **changes: Any) -> tuple[Case, ReferenceEagle3]:
    """A case and the reference holding its weights; ``changes`` go to the config or the case."""
    torch.manual_seed(seed)
    fields = {f.name for f in dataclasses.fields(ReferenceConfig)}
    config = dataclasses.replace(CONFIG, **{k: v for k, v in changes.items() if k in fields})
    vocab = config.vocab_size
    ids = torch.randperm(vocab)[: config.draft_vocab_size].sort().values
    embedding = torch.randn(vocab, HIDDEN)
    output_weight = torch.randn(vocab, HIDDEN) / 3
    final_hidden = torch.randn(BATCH, LENGTH, HIDDEN)
    reference = ReferenceEagle3(config, embedding, ids)
    with torch.no_grad():
        for parameter in reference.parameters():
            offset = 1.0 if parameter.dim() == 1 else 0.0
            # EAGLE-1's layers have no norm in front: larger weights are ill-conditioned in fp32.
            spread = 0.1 if config.eagle1 else 0.2
            parameter.copy_(offset + spread * torch.randn_like(parameter))
        if config.eagle1:
            reference.lm_head.requires_grad_(False).weight.copy_(output_weight)
    mask = torch.rand(BATCH, LENGTH) < 0.6
    mask[0, :5] = False
    case = Case(
        config=config,
        weights={name: p.detach().clone() for name, p in reference.named_parameters()},
        vocab_ids=ids,
        embedding=embedding,
        output_weight=output_weight,
        aux=final_hidden if config.eagle1 else torch.randn(BATCH, LENGTH, config.num_aux * HIDDEN),
        final_hidden=final_hidden,
        tokens=torch.randint(vocab, (BATCH, LENGTH)),
        loss_mask=mask.float(),
        **{k: v for k, v in changes.items() if k not in fields},
    )
    return case, reference


def run_case(rank: int, world: int, case: Case) -> dict[str, Any]:
    """Loss, sums and gradients of this rank's shards, gradients finished as Megatron does."""
    groups = megatron_parallel(tp=world // case.cp, cp=case.cp)
    from megatron_eagle.objective.batch import EagleBatch
    from megatron_eagle.objective.metrics import MetricSums

    model = build_model(case)
    context = (groups.cp.rank(), case.cp)
    batch = EagleBatch.build(
        case.tokens, case.loss_mask, case.config.ttt_steps, multiple=world * (1 + (case.cp > 1)),
        trim=case.trim, context=context, positions=case.positions,
    )  # fmt: skip
    loss, sums = model(batch)
    total = loss.detach().clone()
    sums = sums.detach()
    for tensor in (total, sums):
        torch.distributed.all_reduce(tensor, group=groups.cp)
    rows = MetricSums.unpack(sums).rows[0]
    (loss / rows).backward()
    for parameter in model.draft.parameters():
        torch.distributed.all_reduce(parameter.grad, group=groups.cp)
        if getattr(parameter, "sequence_parallel", False) and case.sequence_parallel:
            torch.distributed.all_reduce(parameter.grad, group=groups.tp)
    shard = model.draft.shard
    return {
        "loss": float(total / rows),
        "sums": sums,
        "grads": {name: p.grad for name, p in model.draft.named_parameters()},
        "vocab": (shard.start, shard.rows),
        "tp": (groups.tp.rank(), groups.tp.size()),
    }


def close(found: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    scale = max(float(expected.abs().max()), 1e-3)
    worst = float((found - expected).abs().max()) / scale
    assert worst < tolerance, f"{what}: relative difference {worst:.2e}"


def compare(case: Case, reference: ReferenceEagle3, results: list[dict[str, Any]]) -> None:
    base_logits = case.final_hidden @ case.output_weight.t()
    expected = reference.forward_ttt(case.aux, case.tokens, base_logits, case.loss_mask)
    compare_with(expected, case, reference, results)


def compare_with(
    expected: dict[str, Tensor],
    case: Case,
    reference: ReferenceEagle3,
    results: list[dict[str, Any]],
) -> None:
    from megatron_eagle.objective.metrics import MetricSums

    expected["loss"].backward()
    grads = {name: p.grad for name, p in reference.named_parameters()}
    steps = case.config.ttt_steps
    if case.config.num_experts:  # a rank's loss holds its tokens' part of the balance loss
        weights = case.config.step_decay ** torch.arange(steps)
        rows = float((weights * expected["loss_sums"].detach()).sum() / expected["counts"][0])
        parts = [result["loss"] - rows for result in results]  # summed over CP already
        whole = rows + sum(parts) / case.cp
        results = [{**result, "loss": whole} for result in results]
    for rank, result in enumerate(results):
        close(torch.tensor(result["loss"]), expected["loss"].detach(), "loss")
        sums = MetricSums.unpack(result["sums"])
        wanted = expected.get("regression_sums", torch.zeros(steps)).detach()
        close(sums.regression, wanted, "regression per step")
        close(sums.loss, expected["loss_sums"].detach(), "loss per step")
        assert sums.rows.tolist() == expected["counts"].tolist()
        assert sums.hits.tolist() == expected["hits"].tolist()
        assert sums.prefix_hits.tolist() == expected["prefixes"].tolist()
        for name, (sources, kind) in megatron_names(case).items():
            whole = local_part([grads[s] for s in sources], kind, case, *result["tp"])
            found = result["grads"][name]
            if kind == "vocab":
                start, rows = result["vocab"]
                assert not found[rows:].any(), "padding rows must get no gradient"
                whole, found = whole[start : start + rows], found[:rows]
                if rows == 0:
                    continue
            close(found, whole, f"gradient of {name} on rank {rank}")


FULL_VOCAB = {"draft_vocab_size": 61}
EAGLE1 = {"eagle1": True, "num_aux": 1, **FULL_VOCAB}
EXPERTS = {"num_experts": 4, "topk": 2, "balance": 0.5}
EAGLE31 = {"fc_norm": True, "norm_output": True}
MLA = {
    **{"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "v_head_dim": 6},
    "head_dim": 8,
}
YARN = {
    "rope_type": "yarn",
    **{"factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 4.0, "beta_slow": 1.0},
    **{"mscale": 0.7, "mscale_all_dim": 0.5, "attention_factor": 1.03},
}
CASES = [
    pytest.param(1, {}, id="tp1"),
    pytest.param(1, {"ttt_steps": 1}, id="tp1-k1"),
    pytest.param(1, {"ttt_steps": 5, "num_layers": 2}, id="tp1-k5-two-layers"),
    pytest.param(1, {"detach_steps": True}, id="tp1-detach"),
    pytest.param(1, {"trim": True, "recompute_modules": ("mlp",)}, id="tp1-trim-recompute"),
    pytest.param(2, {}, id="tp2"),
    pytest.param(2, {"sequence_parallel": True, "ttt_steps": 5}, id="tp2-sp-k5"),
    pytest.param(2, {"sequence_parallel": True, "num_layers": 2, "trim": True}, id="tp2-sp-trim"),
    pytest.param(2, {**FULL_VOCAB, "mask_out_of_vocab": True}, id="tp2-full-vocab"),
    pytest.param(2, {"mask_out_of_vocab": True, "ttt_steps": 1}, id="tp2-mask-out-of-vocab"),
    pytest.param(4, {"ttt_steps": 5, "logits_budget_mib": 0}, id="tp4-at-once"),
    pytest.param(4, {"sequence_parallel": True, **FULL_VOCAB}, id="tp4-sp-full-vocab"),
    pytest.param(4, {"draft_vocab_size": 5}, id="tp4-empty-shard"),
    pytest.param(2, {"cp": 2, "num_layers": 2}, id="cp2-two-layers"),
    pytest.param(4, {"cp": 4, "trim": True}, id="cp4-trim"),
    pytest.param(4, {"cp": 2, "sequence_parallel": True, "ttt_steps": 5}, id="tp2-sp-cp2-k5"),
    pytest.param(4, {"cp": 2, "mask_out_of_vocab": True, "trim": True}, id="tp2-cp2-trim"),
    pytest.param(1, {**EAGLE1, "num_layers": 2}, id="tp1-eagle1-two-layers"),
    pytest.param(2, EAGLE1, id="tp2-eagle1"),
    pytest.param(2, {**EAGLE1, "sequence_parallel": True, "trim": True}, id="tp2-sp-eagle1"),
    pytest.param(2, {**EAGLE1, "cp": 2}, id="cp2-eagle1"),
    pytest.param(1, {**EAGLE31, "num_aux": 2}, id="tp1-eagle31"),
    pytest.param(2, {**EAGLE31, "norm_before_residual": True}, id="tp2-eagle31"),
    pytest.param(2, {**EAGLE31, "sequence_parallel": True}, id="tp2-sp-eagle31"),
    pytest.param(2, {"norm_before_fc": True}, id="tp2-norm-before-fc"),
    pytest.param(1, {"mask_token": 7, "num_layers": 2}, id="tp1-p-eagle-two-layers"),
    pytest.param(2, {"mask_token": 7}, id="tp2-p-eagle"),
    pytest.param(2, {"mask_token": 60, "sequence_parallel": True}, id="tp2-sp-p-eagle"),
    pytest.param(2, {"mask_token": 7, "cp": 2, "num_layers": 2}, id="cp2-p-eagle"),
    pytest.param(1, {**EXPERTS, "num_layers": 2}, id="tp1-moe-two-layers"),
    pytest.param(2, {**EXPERTS, "sequence_parallel": True}, id="tp2-sp-moe"),
    pytest.param(2, {**EXPERTS, "cp": 2, "mask_out_of_vocab": True}, id="cp2-moe"),
    pytest.param(
        4,
        {**EXPERTS, **MLA, "cp": 2, "sequence_parallel": True},
        id="tp2-sp-cp2-mla-moe",
        marks=pytest.mark.slow,
    ),
    pytest.param(1, {**MLA, "rope_scaling": YARN, "num_layers": 2}, id="tp1-mla-yarn"),
    pytest.param(2, MLA, id="tp2-mla"),
    pytest.param(1, {**MLA, **EAGLE1}, id="tp1-mla-eagle1", marks=pytest.mark.slow),
    pytest.param(
        2,
        {**MLA, **EAGLE31, "rope_scaling": YARN, "sequence_parallel": True, "mask_token": None},
        id="tp2-sp-mla-eagle31",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        2,
        {**MLA, "mask_token": 7, "sequence_parallel": True},
        id="tp2-sp-mla-p-eagle",
        marks=pytest.mark.slow,
    ),
    pytest.param(2, {**MLA, "sequence_parallel": True, "q_lora_rank": 0}, id="tp2-sp-mla"),
    pytest.param(2, {**MLA, "cp": 2, "recompute_modules": ("mlp",)}, id="cp2-mla-recompute"),
    pytest.param(2, {"loss": "ce"}, id="tp2-ce"),
    pytest.param(2, {"loss": "tv", **FULL_VOCAB}, id="tp2-tv-full-vocab"),
    pytest.param(2, {"loss": "lk-alpha", "logits_budget_mib": 0}, id="tp2-lk-alpha-at-once"),
    pytest.param(2, {"loss": "lk-lambda", "lk_decay": 2.0}, id="tp2-lk-lambda"),
    pytest.param(2, {"loss": "reverse-kl", "logits_budget_mib": 0}, id="tp2-reverse-at-once"),
    pytest.param(4, {"loss": "reverse-kl", "draft_vocab_size": 5}, id="tp4-reverse-empty-shard"),
    pytest.param(4, {"loss": "ce", "draft_vocab_size": 5}, id="tp4-ce-empty-shard"),
    pytest.param(4, {"loss": "lk-lambda", "sequence_parallel": True}, id="tp4-sp-lk-lambda"),
    pytest.param(
        2,
        {"norm_before_fc": True, "norm_before_residual": True, "sequence_parallel": True},
        id="tp2-sp-norms",
    ),
]


@pytest.mark.parametrize(("world", "changes"), CASES)
def test_equals_reference(world: int, changes: dict[str, Any]) -> None:
    case, reference = make_case(**changes)
    compare(case, reference, run_distributed(run_case, world, case))


def test_the_comparison_can_fail() -> None:
    """A draft with one weight off must not pass for the reference."""
    case, reference = make_case()
    case.weights["norm.weight"][0] += 0.01
    with pytest.raises(AssertionError, match="relative difference"):
        compare(case, reference, run_distributed(run_case, 1, case))
