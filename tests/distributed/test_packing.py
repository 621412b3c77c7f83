"""Packed sequences: losses and gradients are those of the documents alone, in base and draft."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.draft_fixture import Case
from tests.helpers.reference_case import close, compare_with, make_case, run_case
from tests.reference.eagle3 import ReferenceEagle3

STARTS = [[0, 9, 13, 24], [0, 2, 3, 17, 24]]
"""Of two sequences of 24; one document has a single token, several are shorter than the unroll."""


def positions_of(starts: list[list[int]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(b - a) for a, b in pairwise(s)]) for s in starts])


def reference_of_documents(case: Case, reference: ReferenceEagle3) -> dict[str, Tensor]:
    """The oracle's sums over the documents, each run alone."""
    logits = case.final_hidden @ case.output_weight.t()
    parts = [
        reference.forward_ttt(
            *(x[row : row + 1, a:b] for x in (case.aux, case.tokens, logits, case.loss_mask))
        )
        for row, starts in enumerate(STARTS)
        for a, b in pairwise(starts)
    ]
    summed = ("loss_sums", "counts", "hits", "prefixes")
    total = {key: sum(part[key] for part in parts) for key in summed}
    weights = case.config.step_decay ** torch.arange(case.config.ttt_steps)
    total["loss"] = (weights * total["loss_sums"]).sum() / total["counts"][0]
    return total


CASES = [
    pytest.param(1, {"ttt_steps": 5, "num_layers": 2}, id="tp1-k5-two-layers"),
    pytest.param(1, {"trim": True}, id="tp1-trim"),
    pytest.param(2, {"sequence_parallel": True}, id="tp2-sp"),
    pytest.param(2, {"cp": 2}, id="cp2"),
    pytest.param(4, {"cp": 2, "sequence_parallel": True, "ttt_steps": 5}, id="tp2-sp-cp2-k5"),
]


@pytest.mark.parametrize(("world", "changes"), CASES)
def test_the_draft_treats_documents_as_if_alone(world: int, changes: dict[str, Any]) -> None:
    case, reference = make_case(**changes, positions=positions_of(STARTS))
    expected = reference_of_documents(case, reference)
    compare_with(expected, case, reference, run_distributed(run_case, world, case))


def test_the_comparison_can_fail() -> None:
    case, reference = make_case(positions=None)
    expected = reference_of_documents(case, reference)
    with pytest.raises(AssertionError):
        compare_with(expected, case, reference, run_distributed(run_case, 1, case))


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {}),
        (1, {"window_size": (4, 0), "softmax_type": "learnable"}),
        (2, {"sequence_parallel": True}),
        (2, {"cp": 2}),
    ],
)
def test_base_and_draft_together_treat_documents_as_if_alone(
    world: int, layout: dict[str, Any]
) -> None:
    """A real base: packed sequences against one sequence a document, losses and gradients."""
    for packed, alone in run_distributed(packed_and_alone, world, layout):
        close(packed["sums"], alone["sums"], "sums")
        assert packed["grads"].keys() == alone["grads"].keys()
        for name, grad in alone["grads"].items():
            close(packed["grads"][name], grad, f"gradient of {name}")


def packed_and_alone(rank: int, world: int, layout: dict[str, Any]) -> tuple[Any, Any]:
    context_parallel = layout.get("cp", 1)
    groups = megatron_parallel(tp=world // context_parallel, cp=context_parallel)
    from megatron_eagle.objective.batch import EagleBatch

    model = real_model(groups, layout)
    torch.manual_seed(0)
    tokens, mask = torch.randint(61, (2, 24)), (torch.rand(2, 24) < 0.7).float()
    context, steps = (groups.cp.rank(), context_parallel), model.options.train.ttt_steps

    def build(tokens: Tensor, mask: Tensor, positions: Tensor | None) -> Any:
        parts = groups.tp.size() if model.draft.config.sequence_parallel else 1
        return EagleBatch.build(
            tokens, mask, steps, multiple=4, parts=parts, context=context, positions=positions
        )

    singles = []
    for row, starts in enumerate(STARTS):
        for a, b in pairwise(starts):
            alone_tokens, alone_mask = torch.zeros(1, 24).long(), torch.zeros(1, 24)
            alone_tokens[0, : b - a] = tokens[row, a:b]
            alone_mask[0, : b - a - 1] = mask[row, a : b - 1]
            singles.append(build(alone_tokens, alone_mask, None))
    return (
        losses_and_gradients(model, [build(tokens, mask, positions_of(STARTS))]),
        losses_and_gradients(model, singles),
    )


def losses_and_gradients(model: Any, batches: list[Any]) -> dict[str, Any]:
    model.zero_grad()
    total: Any = 0
    groups = model.pg_collection
    for batch in batches:
        loss, sums = model(batch)
        loss.backward()
        total = total + sums.detach()
    torch.distributed.all_reduce(total, group=groups.cp)
    for parameter in model.draft.parameters():
        torch.distributed.all_reduce(parameter.grad, group=groups.cp)
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(parameter.grad, group=groups.tp)
    return {
        "sums": total,
        "grads": {name: p.grad.clone() for name, p in model.draft.named_parameters()},
    }


def real_model(groups: Any, layout: dict[str, Any]) -> Any:
    """A random three-layer base with a draft on it, fp32."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    from megatron_eagle.config import EagleConfig
    from megatron_eagle.draft.metadata import encode_metadata
    from megatron_eagle.draft.model import EagleDraft
    from megatron_eagle.layers.backend import local_backend
    from megatron_eagle.model import EagleGPTModel
    from megatron_eagle.parallel.vocab import draft_vocab_shard
    from megatron_eagle.teacher.base import FrozenBase

    config = TransformerConfig(
        num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4,
        num_query_groups=2, kv_channels=8, normalization="RMSNorm", gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, hidden_dropout=0.0,
        attention_dropout=0.0, tensor_model_parallel_size=groups.tp.size(),
        context_parallel_size=groups.cp.size(),
        init_method_std=0.2,
        bias_activation_fusion=False, gradient_accumulation_fusion=False,
        apply_rope_fusion=False, calculate_per_token_loss=True,
        **{key: value for key, value in layout.items() if key != "cp"},
    )  # fmt: skip
    backend = local_backend()
    gpt = GPTModel(
        config, backend.base_spec(config, 0), 64, 64, position_embedding_type="rope",
        pg_collection=groups,
    )  # fmt: skip
    base = FrozenBase(gpt, (0, 1, 2), 61)
    options = EagleConfig.of(ttt_steps=3, aux_layers=(0, 1, 2))
    ids = torch.arange(0, 61, 2)
    shard = draft_vocab_shard(ids.numel(), 61, base.output_weight.shape[0], groups.tp)
    one_layer = copy.copy(config)
    one_layer.num_layers = 1
    one_layer.window_size, one_layer.softmax_type = None, "vanilla"
    draft = EagleDraft(
        config=one_layer, backend=backend, spec=options.spec, num_aux=3, vocab_ids=ids,
        shard=shard, metadata=encode_metadata({}), pg_collection=groups,
        base_head=lambda: base.output_weight, rotary=base.rotary,
    )  # fmt: skip
    return EagleGPTModel(base, draft, options)
