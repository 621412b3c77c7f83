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
    """Answer the prompts with each draft: the answers, and the drafts of every round. In every
    second round the first draft is replaced by the true token, so that some are accepted."""
    parallel = layout.get("sp", False)
    groups = megatron_parallel(**{name: size for name, size in layout.items() if name != "sp"})
    from megatron_eagle.decode import load
    from megatron_eagle.decode.base import CachedBase
    from megatron_eagle.decode.block import BlockProposer
    from megatron_eagle.decode.interleave import interleave
    from megatron_eagle.decode.speculative import ChainCounts, speculative_steps
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
        rounds: list[list[list[int]]] = []

        class Spy(BlockProposer):
            lengths = [1] * len(PROMPTS)

            def propose(self, verified: Any, rounds: Any = rounds) -> Tensor:
                drafts = super().propose(verified)
                rounds.append(drafts.tolist())
                known = (verified.start + verified.last + 1).tolist()
                if len(rounds) % 2 == 0:
                    for row, (length, prompt) in enumerate(zip(known, PROMPTS, strict=True)):
                        answer = truth[row]
                        at = min(length - len(prompt) + 1, len(answer) - 1)
                        drafts[row, 0] = answer[at]
                return drafts

            def keep(self, sequences: Tensor) -> None:
                raise AssertionError("all prompts end together")

        def proposer(
            capacity: int, draft: Any = draft, cached: Any = cached, k: int = steps
        ) -> Spy:
            return Spy(draft, cached, k, capacity)

        counts = ChainCounts(steps)
        monkey = pytest.MonkeyPatch()
        monkey.setattr("megatron_eagle.decode.sequences.COMPACT_BELOW", -1.0)
        (answers,) = interleave(
            [speculative_steps(cached, proposer, PROMPTS, NEW_TOKENS, steps, counts)]
        )
        monkey.undo()
        result[name] = {"answers": answers, "rounds": rounds, "accepted": counts.accepted}
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
        check_rounds(name, case, found[name]["rounds"], model, truth)


def check_rounds(
    name: str, case: BlockCase, rounds: Any, model: torch.nn.Module, truth: list[list[int]]
) -> None:
    """Follow each sequence through the rounds, and compare what was drafted in each."""
    reference = reference_of(case)
    for row, prompt in enumerate(PROMPTS):
        written = 1  # of the answer, after the prefill
        for number, drafts in enumerate(rounds, start=1):
            if written >= NEW_TOKENS:
                break
            prefix = torch.tensor([*prompt, *truth[row][:written]])
            with torch.no_grad():
                states = model(prefix[None], output_hidden_states=True).hidden_states
            aux = torch.cat([states[layer + 1][0] for layer in AUX_LAYERS], dim=-1).double()
            expected = reference.draft(aux[:-1], prefix)
            assert drafts[row] == expected, (name, row, number)
            tried = list(expected)
            if number % 2 == 0:
                tried[0] = truth[row][min(written, len(truth[row]) - 1)]
            rest = truth[row][written:]
            hits = 0
            while hits < min(len(tried), len(rest)) and tried[hits] == rest[hits]:
                hits += 1
            written += hits + 1
