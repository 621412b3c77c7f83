"""One iteration of a base's own next-token module in some layout, and the oracle's results."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.testing.harness import run_distributed
from tests.helpers.module_base import CONFIGS, name_in_file, tensors_of
from tests.helpers.pipeline_case import (
    LENGTH,
    STARTS,
    documents_of,
    groups_of,
    outputs_of_base,
    run_iteration,
)
from tests.helpers.pipeline_fixture import ModuleDraft, PipelineCase
from tests.helpers.reference_case import close
from tests.helpers.tiny_hf import SIZES
from tests.reference.mtp import ReferenceMTP


def make_module_case(
    folder: Path, kind: str, micro_batches: int, dp: int, *, packed: bool = False,
    changes: dict[str, Any] | None = None, **layout: Any,
) -> PipelineCase:  # fmt: skip
    """Random micro-batches for the base and module in `folder`; `changes` go to the oracle's
    configuration."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIGS[kind], **(changes or {}))
    vocab = SIZES["vocab_size"]
    draft = ModuleDraft(kind, config, str(folder / kind / "hf"), torch.arange(vocab))
    positions = [
        torch.stack([torch.cat([torch.arange(b - a) for a, b in pairwise(s)]) for s in STARTS])
    ]

    def micro_batch(index: int) -> tuple[Tensor, ...]:
        mask = torch.rand(2, LENGTH) < 0.7
        mask[:, LENGTH - 2 - 3 * (index % 3) :] = False  # lengths differ once trimmed
        tokens = torch.randint(vocab, (2, LENGTH))
        return tokens, mask.float(), *(positions if packed else [])

    by_rank = [[micro_batch(i) for i in range(micro_batches)] for _ in range(dp)]
    return PipelineCase(draft, str(folder / kind / "base"), (), by_rank, **layout)


def train_once(rank: int, world: int, cases: list[PipelineCase]) -> list[dict[str, Any]]:
    """Run one iteration of each of `cases`, which share a layout: sums over all ranks, and this
    rank's parts of the finished gradients as (checkpoint key, leading axes, offsets, tensor)."""
    groups = groups_of(cases[0])
    return [_results(case, groups) for case in cases]


def _results(case: PipelineCase, groups: Any) -> dict[str, Any]:
    from megatron_eagle.compat import ShardedTensor, apply_factories, nested_values

    model, _, sums = run_iteration(case, groups)
    draft = model.module.draft
    frozen = {name for name, p in draft.named_parameters() if not p.requires_grad}
    assert all("router" in name for name in frozen), frozen
    trained = 0
    for parameter in draft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.main_grad.clone()
            trained += parameter.numel()
    sharded = draft.sharded_state_dict(prefix="draft.")
    apply_factories(sharded)
    shards = []
    for value in nested_values(sharded):
        if not isinstance(value, ShardedTensor) or not value.data.is_floating_point():
            continue
        if "router" not in value.key:
            offset = tuple(value.global_offset)
            shards.append((value.key, value.prepend_axis_num, offset, value.data.clone()))
    assert sum(shard[-1].numel() for shard in shards) == trained
    return {"sums": sums, "shards": shards}


def expectation(case: PipelineCase) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The oracle's sums, and its gradients per supervised token by the names in the base's files,
    over all documents."""
    draft = case.draft
    assert isinstance(draft, ModuleDraft)
    tensors = {
        name.replace(".language_model.", "."): tensor
        for name, tensor in tensors_of(Path(draft.module)).items()
    }
    reference = ReferenceMTP(draft.config)
    names = {name: name_in_file(draft.kind, name) for name, _ in reference.named_parameters()}
    reference.load_state_dict({ours: tensors[theirs] for ours, theirs in names.items()})
    reference.double()  # so that only the package's rounding differs
    embedding, head = (
        tensors[name].double() for name in ("model.embed_tokens.weight", "lm_head.weight")
    )
    (outputs,) = run_distributed(outputs_of_base, 1, case)
    sums: dict[str, Tensor] = {}
    weights = draft.config.step_decay ** torch.arange(draft.config.steps, dtype=torch.float64)
    for (_, final), (tokens, mask) in zip(outputs, documents_of(case), strict=True):
        found = reference(final.double(), tokens[None], mask[None], embedding, head)
        (weights * found["loss"]).sum().backward()
        for key, value in found.items():
            sums[key] = sums.get(key, 0) + value.detach()
    gradients = {
        names[name]: p.grad / sums["rows"][0]
        for name, p in reference.named_parameters()
        if p.requires_grad
    }
    return sums, gradients


def compare(case: PipelineCase, results: list[dict[str, Any]], tolerance: float) -> None:
    """Compare losses, counts and every part of every gradient with the oracle's."""
    from megatron_eagle.checkpoint.directory import load_base_json
    from megatron_eagle.hf.draft.import_hf import open_hf_draft
    from megatron_eagle.hf.draft.module_entries import module_entries
    from megatron_eagle.objective.metrics import MetricSums

    sums, gradients = expectation(case)
    info = open_hf_draft(case.draft.module, load_base_json(case.base)).info
    wholes = {
        entry.megatron: entry.join([gradients[part.name] for part in entry.sources], info.dims)
        for entry in module_entries(info)
        if "router" not in entry.megatron
    }
    for rank, result in enumerate(results):
        metrics = MetricSums.unpack(result["sums"])
        close(metrics.loss.double(), sums["loss"], "loss per step", tolerance)
        assert metrics.rows.tolist() == sums["rows"].tolist()
        assert metrics.hits.tolist() == sums["hits"].tolist()
        assert {key for key, *_ in result["shards"]} == set(wholes)
        for key, leading, offset, found in result["shards"]:
            part = whole = wholes[key][offset[:leading]]
            for dim, (start, size) in enumerate(zip(offset[leading:], found.shape, strict=True)):
                part = part.narrow(dim, start, size)
            scale = float(whole.abs().max())
            worst = float((found.detach() - part).abs().max()) / scale
            assert worst < tolerance, f"gradient of {key} on rank {rank}: {worst:.2e}"
