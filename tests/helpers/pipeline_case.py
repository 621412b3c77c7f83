"""One iteration beside a real base in some layout, and the reference's results for it."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.draft_fixture import Case, local_part, megatron_names
from tests.helpers.pipeline_fixture import PipelineCase, build_pipeline
from tests.helpers.reference_case import TOLERANCE, close
from tests.helpers.tiny_hf import SIZES, make_base
from tests.reference.eagle3 import ReferenceConfig, ReferenceEagle3

LAYERS, AUX_LAYERS, LENGTH = 7, (0, 3, 6), 24
STARTS = [[0, 9, 13, 24], [0, 2, 3, 17, 24]]
"""Starts of the documents in each of a micro-batch's two packed sequences, and their end."""
CONFIG = ReferenceConfig(
    hidden_size=SIZES["hidden_size"],
    target_hidden_size=SIZES["hidden_size"],
    intermediate_size=SIZES["intermediate_size"],
    num_heads=SIZES["num_attention_heads"],
    num_kv_heads=SIZES["num_key_value_heads"],
    head_dim=8,
    vocab_size=SIZES["vocab_size"],
    draft_vocab_size=23,
    rms_eps=SIZES["rms_norm_eps"],
)
Sums = dict[str, Tensor]


def import_bases(folder: Path) -> Path:
    """Import dense bases of seven layers, "tied" and "untied", each beside its Hugging Face
    files."""
    for name, tied in (("tied", True), ("untied", False)):
        fields = {"num_hidden_layers": LAYERS, "tie_word_embeddings": tied}
        make_base(folder / f"{name}_hf", "llama", **fields)
        import_base(folder / f"{name}_hf", folder / name)
    return folder


def make_case(
    bases: Path,
    name: str,
    micro_batches: int,
    dp: int,
    config: ReferenceConfig = CONFIG,
    aux_layers: tuple[int, ...] = AUX_LAYERS,
    packed: bool = False,
    **layout: Any,
) -> PipelineCase:
    """Make random weights of a draft, and random micro-batches for ``dp`` data-parallel ranks."""
    torch.manual_seed(0)
    source = bases / f"{name}_hf"
    weights = load_file((source if source.is_dir() else bases / "hf") / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    output_weight = weights.get("lm_head.weight", embedding)
    ids = torch.randperm(config.vocab_size)[: config.draft_vocab_size].sort().values
    reference = ReferenceEagle3(config, embedding, ids)
    with torch.no_grad():
        for parameter in reference.parameters():
            spread = 0.1 if config.eagle1 else 0.2  # without norms: ill-conditioned in fp32
            parameter.normal_(0.0, spread).add_(1.0 if parameter.dim() == 1 else 0.0)
        if config.eagle1:
            reference.lm_head.weight.copy_(output_weight)
    empty = torch.empty(0)
    draft = Case(
        config=config,
        weights={name: p.detach().clone() for name, p in reference.named_parameters()},
        vocab_ids=ids,
        embedding=embedding,
        output_weight=output_weight,
        aux=empty,
        final_hidden=empty,
        tokens=empty,
        loss_mask=empty,
        sequence_parallel=layout.get("sequence_parallel", False),
    )
    positions = [
        torch.stack([torch.cat([torch.arange(b - a) for a, b in pairwise(s)]) for s in STARTS])
    ]

    def micro_batch(index: int) -> tuple[Tensor, ...]:
        mask = torch.rand(2, LENGTH) < 0.6
        mask[:, LENGTH - 2 - 3 * (index % 3) :] = False  # lengths differ once trimmed
        tokens = torch.randint(config.vocab_size, (2, LENGTH))
        return tokens, mask.float(), *(positions if packed else [])

    by_rank = [[micro_batch(i) for i in range(micro_batches)] for _ in range(dp)]
    return PipelineCase(draft, str(bases / name), aux_layers, by_rank, **layout)


def documents_of(case: PipelineCase) -> list[tuple[Tensor, Tensor]]:
    """Return (tokens, loss mask) of every document: a packed one, or a whole sequence."""
    micro_batches = [micro_batch for by_rank in case.micro_batches for micro_batch in by_rank]
    return [
        (tokens[row, a:b], mask[row, a:b])
        for tokens, mask, *positions in micro_batches
        for row, starts in enumerate(STARTS if positions else ([0, tokens.shape[1]],) * 2)
        for a, b in pairwise(starts)
    ]


def outputs_of_base(rank: int, world: int, case: PipelineCase) -> list[tuple[Tensor, Tensor]]:
    """Run the undivided base on every document: (features, final hidden) [1, S, ...] of each."""
    undivided = {"tp": 1, "pp": 1, "cp": 1, "ep": 1, "first": None, "sequence_parallel": False}
    model, _, _ = build_pipeline(dataclasses.replace(case, **undivided))
    runs = [model.module.base(tokens.unsqueeze(0)) for tokens, _ in documents_of(case)]
    return [(run.features.transpose(0, 1), run.final_hidden.transpose(0, 1)) for run in runs]


def train_once(rank: int, world: int, cases: list[PipelineCase]) -> list[dict[str, Any]]:
    """Run one iteration of each of ``cases``, which share a layout."""
    groups = groups_of(cases[0])
    return [_results(case, groups) for case in cases]


def groups_of(layout: PipelineCase) -> Any:
    """Set up Megatron in this rank for the layout of a case, and return its process groups."""
    return megatron_parallel(tp=layout.tp, pp=layout.pp, cp=layout.cp, ep=layout.ep)


def run_iteration(case: PipelineCase, groups: Any) -> tuple[Any, int, Tensor]:
    """Run one iteration: the model, how many micro-batches this rank reported, and the metric sums
    over all ranks."""
    model, step, _ = build_pipeline(case, groups)
    micro_batches = case.micro_batches[groups.dp.rank()]
    reports = schedule_of(model)(
        forward_step_func=step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=LENGTH,
        micro_batch_size=2,
        pg_collection=groups,
    )
    sums = torch.stack([report["eagle_sums"] for report in reports]).sum(0)
    for group in (groups.dp_cp, groups.pp):
        torch.distributed.all_reduce(sums, group=group)
    return model, len(reports), sums


def _results(case: PipelineCase, groups: Any) -> dict[str, Any]:
    """Run one iteration: sums over all ranks, finished gradients, and this rank's part of them."""
    model, reported, sums = run_iteration(case, groups)
    draft = model.module.draft
    if case.distributed_optimizer:  # each rank has finished its shard only
        for buffer in model.buffers:
            shard = buffer.grad_data.chunk(groups.dp_cp.size())[groups.dp_cp.rank()].clone()
            torch.distributed.all_gather_into_tensor(buffer.grad_data, shard, group=groups.dp_cp)
    return {
        "micro_batches": reported,
        "sums": sums,
        "grads": {
            name: p.main_grad.clone() for name, p in draft.named_parameters() if p.requires_grad
        },
        "shared": {getattr(p, "shared", False) for p in draft.parameters()},
        "added_by_loss": [
            name for name, p in draft.named_parameters() if getattr(p, "grad_added_to_main_grad", 0)
        ],
        "vocab": (draft.shard.start, draft.shard.rows),
        "tp": (groups.tp.rank(), groups.tp.size()),
        "stage": groups.pp.rank(),
    }


def schedule_of(model: Any) -> Any:
    """Return the schedule that training runs ``model`` by: on pipeline stages the package's, else
    Megatron's."""
    from megatron_eagle.compat import finalize_model_grads, require
    from megatron_eagle.pipeline.schedule import PipelineSchedule

    if model.module.exchange.stages > 1:
        return PipelineSchedule()
    model.module.config.finalize_model_grads_func = finalize_model_grads
    return require("megatron.core.pipeline_parallel.schedules:forward_backward_no_pipelining")


def expectation(case: PipelineCase) -> tuple[Sums, Sums]:
    """Return the reference's sums and gradients per supervised token, over all documents."""
    config, weights = case.draft.config, case.draft.weights
    reference = ReferenceEagle3(config, case.draft.embedding, case.draft.vocab_ids)
    reference.load_state_dict(weights, strict=False)
    reference.double()  # so that only the package's rounding differs
    reference.lm_head.requires_grad_(not config.eagle1)
    (outputs,) = run_distributed(outputs_of_base, 1, case)
    sums: Sums = {}
    for (aux, final), (tokens, mask) in zip(outputs, documents_of(case), strict=True):
        logits = final.double() @ case.draft.output_weight.double().t()
        result = reference.forward_ttt(aux.double(), tokens.unsqueeze(0), logits, mask.unsqueeze(0))
        (result["loss"] * result["counts"][0]).backward()
        for key in {"loss_sums", "counts", "hits", "prefixes", "regression_sums"} & result.keys():
            sums[key] = sums.get(key, 0) + result[key].detach()
    supervised = sums["counts"][0]
    gradients = {k: p.grad / supervised for k, p in reference.named_parameters() if p.requires_grad}
    return sums, gradients


def compare(
    case: PipelineCase, results: list[dict[str, Any]], tolerance: float = TOLERANCE
) -> None:
    """Compare losses, counts and gradients on every rank with the reference's; replicas must be
    bit-equal."""
    from megatron_eagle.objective.metrics import MetricSums

    sums, gradients = expectation(case)
    steps = case.draft.config.ttt_steps
    for rank, result in enumerate(results):
        metrics = MetricSums.unpack(result["sums"])
        close(metrics.loss, sums["loss_sums"], "loss per step", tolerance)
        regressions = sums.get("regression_sums", torch.zeros(steps))
        close(metrics.regression, regressions, "regression per step", tolerance)
        counts = {"counts": metrics.rows, "hits": metrics.hits, "prefixes": metrics.prefix_hits}
        for name, value in counts.items():
            assert value.tolist() == sums[name].tolist(), name
        for parameter, (sources, kind) in megatron_names(case.draft).items():
            whole = local_part([gradients[s] for s in sources], kind, case.draft, *result["tp"])
            gradient = result["grads"][parameter]
            if kind == "vocab":
                start, rows = result["vocab"]
                whole, gradient = whole[start : start + rows], gradient[:rows]
                if rows == 0:
                    continue
            close(gradient, whole, f"gradient of {parameter} on rank {rank}", tolerance)
            for other in results:
                if other["tp"] == result["tp"]:
                    assert other["grads"][parameter].equal(result["grads"][parameter])
