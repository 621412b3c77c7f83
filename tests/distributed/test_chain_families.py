"""What a draft of each EAGLE generation proposes after a prefill is the reference's chain."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import load_base_json
from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.draft_fixture import Case, draft_spec, load_reference_weights
from tests.helpers.tiny_hf import SIZES, make_base
from tests.reference.decode import draft_chain
from tests.reference.eagle3 import ReferenceConfig, ReferenceEagle3

AUX_LAYERS, DRAFTS, VOCAB = (0, 2), 3, SIZES["vocab_size"]
PROMPTS = [[5, 9, 2, 40, 11], [7], [3, 3, 8]]
YARN = {
    "rope_type": "yarn",
    **{"factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 4.0, "beta_slow": 1.0},
    **{"mscale": 0.7, "mscale_all_dim": 0.5},
}
MLA = {"q_lora_rank": 20, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 8}
MLA |= {"head_dim": 6, "rope_scaling": YARN}  # as the base's
SCALED = {"rope_parameters": {"rope_theta": 10000.0, **YARN}}
GROUPED_VARIANTS: dict[str, dict[str, Any]] = {
    "eagle1": {"eagle1": True, "num_aux": 1, "draft_vocab_size": VOCAB, "num_layers": 2},
    "eagle3.1": {"fc_norm": True, "norm_output": True},
    "widths": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 12, "intermediate_size": 20},
    "p-eagle": {"mask_token": 2, "num_layers": 2},
    "moe": {"num_experts": 4, "topk": 2, "num_layers": 2},
    "qk-norm": {"qk_norm": True},
    "norms": {"norm_before_fc": True, "norm_before_residual": True},
}
MLA_VARIANTS: dict[str, dict[str, Any]] = {
    "mla": {**MLA, "num_layers": 2},
    "mla-moe": {**MLA, "num_experts": 4, "topk": 2},
    "mla-p-eagle": {**MLA, "mask_token": 2},
    "mla-own-widths": {
        **{**MLA, "q_lora_rank": 0, "kv_lora_rank": 9, "num_heads": 4, "head_dim": 10},
        **{"qk_rope_head_dim": 6, "v_head_dim": 5, "intermediate_size": 20},
    },
}


def make_reference(embedding: Tensor, output: Tensor, changes: dict[str, Any]) -> ReferenceEagle3:
    size = SIZES["hidden_size"]
    config = ReferenceConfig(
        hidden_size=size, target_hidden_size=size, num_aux=len(AUX_LAYERS),
        intermediate_size=SIZES["intermediate_size"], num_heads=8, num_kv_heads=4, head_dim=8,
        vocab_size=VOCAB, draft_vocab_size=23, rms_eps=1e-5,
    )  # fmt: skip
    config = dataclasses.replace(config, **changes)
    torch.manual_seed(3)
    ids = torch.randperm(VOCAB)[: config.draft_vocab_size].sort().values
    reference = ReferenceEagle3(config, embedding, ids)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0.0, 0.2).add_(1.0 if parameter.dim() == 1 else 0.0)
        if config.eagle1:
            reference.lm_head.weight.copy_(output)
    return reference


def propose(
    rank: int, world: int, directory: str, cases: dict[str, Case], layout: dict[str, Any]
) -> dict[str, Any]:
    """The first chain after prefilling the prompts: the base's tokens and each draft's."""
    sequence_parallel = layout.get("sp", False)
    groups = megatron_parallel(**{name: size for name, size in layout.items() if name != "sp"})
    from megatron_eagle.decode import load
    from megatron_eagle.decode.base import CachedBase
    from megatron_eagle.decode.chain import DraftChain
    from megatron_eagle.decode.interleave import interleave
    from megatron_eagle.decode.speculative import ChainCounts, speculative_steps
    from megatron_eagle.draft.metadata import encode_metadata
    from megatron_eagle.hf.draft.info import DraftInfo
    from megatron_eagle.pipeline.exchange import StageExchange
    from megatron_eagle.pipeline.links import StageLinks

    base = load_base_json(directory)
    links = StageLinks(groups.pp) if groups.pp.size() > 1 else None
    # The tools decode without sequence parallelism, training with it.
    load.base_config = partial(load.base_config, sequence_parallel=sequence_parallel)
    result = {}
    for name, case in cases.items():
        captured = () if case.config.eagle1 else AUX_LAYERS
        size = case.vocab_ids.numel()
        size = None if size == base.vocab_size else size
        info = DraftInfo(draft_spec(case.config, captured, size), base, DRAFTS)
        about = load.DraftCheckpointInfo(info, case.vocab_ids, encode_metadata({}))
        frozen = load.load_base(directory, base, groups, captured)
        exchange = StageExchange(frozen, links)
        draft = load.fresh_draft(about, frozen, exchange)
        load_reference_weights(
            draft, dataclasses.replace(case, sequence_parallel=sequence_parallel)
        )
        cached = CachedBase(frozen, exchange)
        chains: list[Tensor] = []

        class Spy(DraftChain):
            def propose(self, verified: Any, chains: list[Tensor] = chains) -> Tensor:
                chains.append(torch.cat([verified.next_tokens, super().propose(verified)], dim=1))
                return chains[-1][:, -DRAFTS:]

        def proposer(capacity: int, draft: Any = draft, cached: Any = cached) -> Spy:
            return Spy(draft, cached, DRAFTS, capacity)

        counts = ChainCounts(DRAFTS)
        interleave([speculative_steps(cached, proposer, PROMPTS, 2, DRAFTS, counts)])
        result[name] = chains[0]
    return result


FAMILIES = {"llama": ({}, GROUPED_VARIANTS), "deepseek_v3": (SCALED, MLA_VARIANTS)}


SP = {"tp": 2, "sp": True}
LAYOUTS = [
    pytest.param("llama", {}, id="llama-1"),
    pytest.param("llama", {"tp": 2}, id="llama-tp2"),
    pytest.param("llama", SP, id="llama-tp2-sp", marks=pytest.mark.slow),
    pytest.param("llama", {"pp": 2}, id="llama-pp2", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", {}, id="deepseek_v3-1", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", {"tp": 2}, id="deepseek_v3-tp2"),
    pytest.param("deepseek_v3", SP, id="deepseek_v3-tp2-sp", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", {"pp": 2}, id="deepseek_v3-pp2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_chains_are_the_reference_s(family: str, layout: dict[str, Any], tmp_path: Path) -> None:
    fields, variants = FAMILIES[family]
    model = make_base(tmp_path / "hf", family, num_hidden_layers=4, **fields)
    import_base(tmp_path / "hf", tmp_path / "base")
    embedding = model.get_input_embeddings().weight.detach()
    output = model.get_output_embeddings().weight.detach()
    references = {name: make_reference(embedding, output, x) for name, x in variants.items()}
    cases = {}
    for name, reference in references.items():
        none = torch.empty(0)
        weights = {key: p.detach().clone() for key, p in reference.named_parameters()}
        ids = reference.vocab_ids
        cases[name] = Case(
            reference.config, weights, ids, embedding, output, none, none, none, none
        )
    world = 2 if layout else 1
    found = run_distributed(propose, world, str(tmp_path / "base"), cases, layout)[0]
    for name, reference in references.items():
        for row, prompt in enumerate(PROMPTS):
            with torch.no_grad():
                out = model(torch.tensor([prompt]), output_hidden_states=True)
            prefix = torch.tensor([*prompt, int(out.logits[0, -1].argmax())])
            states = out.hidden_states
            aux = (
                states[-1][0]  # after the final norm
                if reference.config.eagle1
                else torch.cat([states[layer + 1][0] for layer in AUX_LAYERS], dim=-1)
            )
            ids, _ = draft_chain(reference, prefix, aux, DRAFTS)
            assert found[name][row, -DRAFTS:].tolist() == ids.tolist(), (name, row)
