"""Every chain that decoding drafts with a next-token module is the oracle's; answers are greedy."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import load_base_json
from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.decode_rounds import check_rounds, run_rounds
from tests.helpers.greedy import greedy
from tests.helpers.module_base import KINDS, make_module_base

PROMPTS = [[5, 9, 2, 40, 11], [7], [3, 3, 8]]
NEW_TOKENS, STEPS = 12, 3


def decode(
    rank: int, world: int, folders: dict[str, str], layout: dict[str, Any], truth: dict[str, Any]
) -> dict[str, Any]:
    """Answer the prompts with each base's module, see `run_rounds`."""
    groups = megatron_parallel(**layout)
    from megatron_eagle.decode import load
    from megatron_eagle.decode.base import CachedBase
    from megatron_eagle.decode.chain import DraftChain
    from megatron_eagle.draft.metadata import draft_metadata, encode_metadata
    from megatron_eagle.hf.draft.checkpoint import open_checkpoint_draft
    from megatron_eagle.pipeline.exchange import StageExchange
    from megatron_eagle.pipeline.links import StageLinks

    links = StageLinks(groups.pp) if groups.pp.size() > 1 else None
    result = {}
    for kind, folder in folders.items():
        base = load_base_json(f"{folder}/base")
        stored = open_checkpoint_draft(f"{folder}/draft")
        content = draft_metadata(stored.info.spec, base, ttt_steps=STEPS)
        about = load.DraftCheckpointInfo(stored.info, stored.vocab_ids, encode_metadata(content))
        frozen = load.load_base(f"{folder}/base", base, groups)
        exchange = StageExchange(frozen, links)
        draft = load.load_draft(about, frozen, f"{folder}/draft")
        cached = CachedBase(frozen, exchange)
        result[kind] = run_rounds(
            DraftChain, draft, cached, PROMPTS, NEW_TOKENS, STEPS, truth[kind]
        )
    return result


LAYOUTS = [
    pytest.param({"tp": 2}, id="tp2"),
    pytest.param({}, id="1", marks=pytest.mark.slow),
    pytest.param({"pp": 2}, id="pp2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chains_are_the_oracle_s_and_answers_the_greedy_ones(
    layout: dict[str, Any], tmp_path: Path
) -> None:
    from megatron_eagle.hf.draft.checkpoint import write_draft_checkpoint
    from megatron_eagle.hf.draft.import_hf import open_hf_draft

    pairs, truth = {}, {}
    for kind in KINDS:
        folder = tmp_path / kind
        pairs[kind] = make_module_base(folder / "hf", kind)
        base = import_base(folder / "hf", folder / "base")
        write_draft_checkpoint(open_hf_draft(folder / "hf", base), folder / "draft")
        truth[kind] = [greedy(pairs[kind][0], prompt, NEW_TOKENS) for prompt in PROMPTS]
    folders = {kind: str(tmp_path / kind) for kind in KINDS}
    found = run_distributed(decode, 2 if layout else 1, folders, layout, truth)[0]
    for kind, (model, reference) in pairs.items():
        assert found[kind]["answers"] == truth[kind], kind
        assert found[kind]["accepted"][0] > 0, kind
        drafted = partial(drafted_by_oracle, model, reference.double())
        check_rounds(kind, found[kind]["rounds"], PROMPTS, NEW_TOKENS, truth[kind], drafted)


@torch.no_grad()
def drafted_by_oracle(model: Any, reference: Any, prefix: Tensor) -> list[int]:
    embedding = model.get_input_embeddings().weight.double()
    head = model.get_output_embeddings().weight.double()
    final = model(prefix[None], output_hidden_states=True).hidden_states[-1][0].double()
    chain: list[int] = reference.draft(final[:-1], prefix, STEPS, embedding, head)
    return chain
