"""Every block that decoding drafts is the oracle's, round after round; answers are greedy ones."""

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
from tests.helpers.block_case import (
    DSPARK,
    BlockCase,
    block_options,
    load_weights,
    random_weights,
    reference_of,
)
from tests.helpers.decode_rounds import check_rounds, run_rounds
from tests.helpers.greedy import greedy
from tests.helpers.tiny_hf import SIZES, make_base
from tests.reference.blocks import BlockConfig, ReferenceBlocks

AUX_LAYERS, VOCAB, NEW_TOKENS = (0, 1, 2), SIZES["vocab_size"], 12
PROMPTS = [[5, 9, 2, 40, 11], [7], [3, 3, 8]]
CONFIG = BlockConfig(
    hidden_size=SIZES["hidden_size"],
    intermediate_size=20,
    num_heads=6,
    num_kv_heads=2,
    head_dim=12,
    vocab_size=VOCAB,
    draft_vocab_size=VOCAB,
    mask_token=2,
    num_aux=len(AUX_LAYERS),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "dflash": {},
    "dflash-compressed": {"draft_vocab_size": 23, "block_size": 5, "num_layers": 1},
    "vanilla": DSPARK,
    "gated-compressed": {**DSPARK, "markov": "gated", "draft_vocab_size": 23},
    "rnn": {**DSPARK, "markov": "rnn", "confidence": False, "num_layers": 1},
}


def make_draft(embedding: Tensor, output: Tensor, changes: dict[str, Any]) -> BlockCase:
    config = dataclasses.replace(CONFIG, **changes)
    torch.manual_seed(3)
    ids = torch.randperm(VOCAB)[: config.draft_vocab_size].sort().values
    weights = random_weights(ReferenceBlocks(config, embedding, output, ids))
    none = torch.empty(0)
    return BlockCase(config, weights, ids, embedding, output, none, none, none, none)


def decode(
    rank: int,
    world: int,
    directory: str,
    cases: dict[str, BlockCase],
    layout: dict[str, Any],
    truth: list[list[int]],
) -> dict[str, Any]:
    """Answer the prompts with each draft, see `run_rounds`."""
    parallel = layout.get("sp", False)
    groups = megatron_parallel(**{name: size for name, size in layout.items() if name != "sp"})
    from megatron_eagle.decode import load
    from megatron_eagle.decode.base import CachedBase
    from megatron_eagle.decode.block import BlockProposer
    from megatron_eagle.draft.metadata import encode_metadata
    from megatron_eagle.hf.draft.info import DraftInfo
    from megatron_eagle.pipeline.exchange import StageExchange
    from megatron_eagle.pipeline.links import StageLinks

    base = load_base_json(directory)
    links = StageLinks(groups.pp) if groups.pp.size() > 1 else None
    # The tools decode without sequence parallelism, training with it.
    load.base_config = partial(load.base_config, sequence_parallel=parallel)
    result = {}
    for name, case in cases.items():
        spec = dataclasses.replace(block_options(case).spec, aux_layers=AUX_LAYERS)
        steps = case.config.drafts
        info = DraftInfo(spec, base, steps)
        about = load.DraftCheckpointInfo(info, case.vocab_ids, encode_metadata({}))
        frozen = load.load_base(directory, base, groups, AUX_LAYERS)
        exchange = StageExchange(frozen, links)
        draft = load.fresh_draft(about, frozen, exchange).requires_grad_(True)
        draft.lm_head.requires_grad_(False)
        load_weights(draft, dataclasses.replace(case, sequence_parallel=parallel))
        draft.requires_grad_(False)
        cached = CachedBase(frozen, exchange)
        result[name] = run_rounds(BlockProposer, draft, cached, PROMPTS, NEW_TOKENS, steps, truth)
    return result


LAYOUTS = [
    pytest.param({}, id="1"),
    pytest.param({"tp": 2}, id="tp2"),
    pytest.param({"tp": 2, "sp": True}, id="tp2-sp", marks=pytest.mark.slow),
    pytest.param({"pp": 2}, id="pp2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_the_oracle_s_and_answers_the_greedy_ones(
    layout: dict[str, Any], tmp_path: Path
) -> None:
    model = make_base(tmp_path / "hf", "llama", num_hidden_layers=4)
    import_base(tmp_path / "hf", tmp_path / "base")
    embedding = model.get_input_embeddings().weight.detach()
    output = model.get_output_embeddings().weight.detach()
    cases = {name: make_draft(embedding, output, x) for name, x in VARIANTS.items()}
    truth = [greedy(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    world = 2 if layout else 1
    found = run_distributed(decode, world, str(tmp_path / "base"), cases, layout, truth)[0]
    for name, case in cases.items():
        assert found[name]["answers"] == truth, name
        assert found[name]["accepted"][0] > 0, name
        drafted = partial(drafted_by_oracle, model, reference_of(case))
        check_rounds(name, found[name]["rounds"], PROMPTS, NEW_TOKENS, truth, drafted)


@torch.no_grad()
def drafted_by_oracle(model: torch.nn.Module, reference: Any, prefix: Tensor) -> list[int]:
    states = model(prefix[None], output_hidden_states=True).hidden_states
    aux = torch.cat([states[layer + 1][0] for layer in AUX_LAYERS], dim=-1).double()
    block: list[int] = reference.draft(aux[:-1], prefix)
    return block
