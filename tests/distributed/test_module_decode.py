"""Every chain that decoding drafts with a next-token module is the oracle's; answers are greedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import load_base_json
from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.greedy import greedy
from tests.helpers.module_base import KINDS, make_module_base

PROMPTS = [[5, 9, 2, 40, 11], [7], [3, 3, 8]]
NEW_TOKENS, STEPS = 12, 3


def decode(
    rank: int, world: int, folders: dict[str, str], layout: dict[str, Any], truth: dict[str, Any]
) -> dict[str, Any]:
    """Answer the prompts with each base's module: the answers, and the drafts of every round. In
    every second round the first draft is replaced by the true token, so that some are accepted."""
    groups = megatron_parallel(**layout)
    from megatron_eagle.decode import load
    from megatron_eagle.decode.base import CachedBase
    from megatron_eagle.decode.chain import DraftChain
    from megatron_eagle.decode.interleave import interleave
    from megatron_eagle.decode.speculative import ChainCounts, speculative_steps
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
        rounds: list[list[list[int]]] = []

        class Spy(DraftChain):
            def propose(self, verified: Any, rounds: Any = rounds, kind: str = kind) -> Tensor:
                drafts = super().propose(verified)
                rounds.append(drafts.tolist())
                known = (verified.start + verified.last + 1).tolist()
                if len(rounds) % 2 == 0:
                    for row, (length, prompt) in enumerate(zip(known, PROMPTS, strict=True)):
                        answer = truth[kind][row]
                        drafts[row, 0] = answer[min(length - len(prompt) + 1, len(answer) - 1)]
                return drafts

            def keep(self, sequences: Tensor) -> None:
                raise AssertionError("all prompts end together")

        def proposer(capacity: int, draft: Any = draft, cached: Any = cached) -> Spy:
            return Spy(draft, cached, STEPS, capacity)

        counts = ChainCounts(STEPS)
        monkey = pytest.MonkeyPatch()
        monkey.setattr("megatron_eagle.decode.sequences.COMPACT_BELOW", -1.0)
        (answers,) = interleave(
            [speculative_steps(cached, proposer, PROMPTS, NEW_TOKENS, STEPS, counts)]
        )
        monkey.undo()
        result[kind] = {"answers": answers, "rounds": rounds, "accepted": counts.accepted}
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
        check_rounds(kind, model, reference.double(), found[kind]["rounds"], truth[kind])


def check_rounds(
    kind: str, model: Any, reference: Any, rounds: Any, truth: list[list[int]]
) -> None:
    """Follow each sequence through the rounds, and compare what was drafted in each."""
    embedding = model.get_input_embeddings().weight.detach().double()
    head = model.get_output_embeddings().weight.detach().double()
    for row, prompt in enumerate(PROMPTS):
        written = 1  # of the answer, after the prefill
        for number, drafts in enumerate(rounds, start=1):
            if written >= NEW_TOKENS:
                break
            prefix = torch.tensor([*prompt, *truth[row][:written]])
            with torch.no_grad():
                states = model(prefix[None], output_hidden_states=True).hidden_states
            final = states[-1][0].double()
            expected = reference.draft(final[:-1], prefix, STEPS, embedding, head)
            assert drafts[row] == expected, (kind, row, number)
            tried = list(expected)
            if number % 2 == 0:
                tried[0] = truth[row][min(written, len(truth[row]) - 1)]
            rest = truth[row][written:]
            hits = 0
            while hits < min(len(tried), len(rest)) and tried[hits] == rest[hits]:
                hits += 1
            written += hits + 1
