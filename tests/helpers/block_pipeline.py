"""One iteration of a block draft beside a real base in some layout, and the oracle's results."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_eagle.testing.harness import run_distributed
from tests.helpers.block_case import (
    CONFIG,
    BlockCase,
    add_block,
    compare_gradients,
    compare_sums,
    divisor_of,
    no_sums,
    random_weights,
    reference_of,
)
from tests.helpers.pipeline_case import AUX_LAYERS, LENGTH, STARTS, documents_of, outputs_of_base
from tests.helpers.pipeline_fixture import PipelineCase
from tests.helpers.tiny_hf import SIZES
from tests.reference.blocks import ReferenceBlocks, judged_slots


def make_block_case(
    bases: Path,
    name: str,
    micro_batches: int,
    dp: int,
    *,
    aux_layers: tuple[int, ...] = AUX_LAYERS,
    packed: bool = False,
    draft: dict[str, Any],
    **layout: Any,
) -> PipelineCase:
    """Make random weights of a draft with the fields ``draft``, and random micro-batches."""
    torch.manual_seed(0)
    source = bases / f"{name}_hf"
    stored = load_file(source / "model.safetensors")
    embedding = stored["model.embed_tokens.weight"]
    output = stored.get("lm_head.weight", embedding)
    config = dataclasses.replace(
        CONFIG,
        **{
            "hidden_size": SIZES["hidden_size"], "intermediate_size": SIZES["intermediate_size"],
            "vocab_size": SIZES["vocab_size"], "draft_vocab_size": SIZES["vocab_size"],
            "num_aux": len(aux_layers), "rms_eps": SIZES["rms_norm_eps"], **draft,
        },
    )  # fmt: skip
    ids = torch.randperm(config.vocab_size)[: config.draft_vocab_size].sort().values
    weights = random_weights(ReferenceBlocks(config, embedding, output, ids))
    none = torch.empty(0)
    case = BlockCase(
        config, weights, ids, embedding, output, none, none, none, none,
        sequence_parallel=layout.get("sequence_parallel", False),
    )  # fmt: skip
    positions = [
        torch.stack([torch.cat([torch.arange(b - a) for a, b in pairwise(s)]) for s in STARTS])
    ]

    def micro_batch(index: int) -> tuple[Tensor, ...]:
        mask = torch.rand(2, LENGTH) < 0.7
        mask[:, LENGTH - 2 - 3 * (index % 3) :] = False  # lengths differ once trimmed
        tokens = torch.randint(config.vocab_size, (2, LENGTH))
        return tokens, mask.float(), *(positions if packed else [])

    by_rank = [[micro_batch(i) for i in range(micro_batches)] for _ in range(dp)]
    return PipelineCase(case, str(bases / name), aux_layers, by_rank, **layout)


def compare_blocks(case: PipelineCase, results: list[dict[str, Any]], tolerance: float) -> None:
    """Compare sums and gradients on every rank with the oracle's; replicas must be bit-equal."""
    from megatron_eagle.objective.block_metrics import BlockSums

    draft = case.draft
    assert isinstance(draft, BlockCase)
    reference, sums = reference_of(draft), no_sums(draft.config.drafts)
    (outputs,) = run_distributed(outputs_of_base, 1, case)
    for (aux, final), (tokens, mask) in zip(outputs, documents_of(case), strict=True):
        supervised = [False, *(mask[: len(tokens) - 1] > 0).tolist()]
        for anchor, judged in enumerate(supervised):
            count = judged_slots(supervised, anchor, draft.config.drafts)
            if judged and count:
                found = reference.judge(aux[0].double(), final[0].double(), tokens, anchor, count)
                add_block(sums, found)
    (sums["loss_sum"] / divisor_of(draft, sums)).backward()
    compare_gradients(draft, reference, results, tolerance)
    for result in results:
        compare_sums(BlockSums.unpack(result["sums"]), sums, draft, tolerance)
        for other in results:
            if other["tp"] == result["tp"]:
                for name, gradient in result["grads"].items():
                    assert other["grads"][name].equal(gradient), name
