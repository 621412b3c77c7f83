"""Speculative answers are the greedy ones, and every drafted chain is the reference's."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import TRACKER_NAME, load_base_json
from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.platform import recommended_environment
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.e2e.forked import run_forked
from tests.helpers.draft_fixture import Case, load_reference_weights
from tests.helpers.tiny_hf import SIZES, make_base
from tests.reference.decode import draft_chain
from tests.reference.eagle3 import ReferenceConfig, ReferenceEagle3

ROOT = Path(__file__).parents[2]
AUX_LAYERS, DRAFTS, NEW_TOKENS, VOCAB = (0, 1, 2), 3, 24, SIZES["vocab_size"]


@dataclass(frozen=True)
class Setup:
    """A tiny base, a random draft for it, and 20 prompts of 1 to 30 tokens."""

    model: torch.nn.Module
    reference: ReferenceEagle3
    base: str
    case: Case
    prompts: list[list[int]]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("base")
    model = make_base(folder / "hf", "llama", num_hidden_layers=4)
    import_base(folder / "hf", folder / "base")
    config = ReferenceConfig(
        hidden_size=SIZES["hidden_size"], target_hidden_size=SIZES["hidden_size"],
        intermediate_size=SIZES["intermediate_size"], num_heads=8, num_kv_heads=4, head_dim=8,
        vocab_size=VOCAB, draft_vocab_size=23, num_layers=2, rms_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(3)
    ids = torch.randperm(VOCAB)[:23].sort().values
    embedding = model.get_input_embeddings().weight.detach()
    reference = ReferenceEagle3(config, embedding, ids)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(0.0, 0.2).add_(1.0 if name.endswith("norm.weight") else 0.0)
    none = torch.empty(0)
    weights = {name: p.detach().clone() for name, p in reference.named_parameters()}
    case = Case(config, weights, ids, embedding, embedding, none, none, none, none)
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))] for _ in range(20)]
    return Setup(model, reference, str(folder / "base"), case, prompts)


def build(world: int, directory: str, case: Case) -> tuple[Any, Any]:
    """The base and the draft, on this rank."""
    groups = megatron_parallel(tp=world)
    from megatron_eagle.config import DraftSpec
    from megatron_eagle.decode.load import DraftCheckpointInfo, fresh_draft, load_base
    from megatron_eagle.draft.metadata import draft_metadata, encode_metadata
    from megatron_eagle.hf.draft.info import DraftInfo

    base = load_base_json(directory)
    layers, size = case.config.num_layers, case.vocab_ids.numel()
    spec = DraftSpec(num_layers=layers, aux_layers=AUX_LAYERS, draft_vocab_size=size)
    info = DraftInfo(spec, base, DRAFTS)
    metadata = encode_metadata(draft_metadata(spec, base, ttt_steps=DRAFTS))
    frozen = load_base(directory, base, groups, AUX_LAYERS)
    draft = fresh_draft(DraftCheckpointInfo(info, case.vocab_ids, metadata), frozen)
    load_reference_weights(draft, case)
    return frozen, draft


class Prompted:
    """Drafts of which the first few are the known greedy answer: ``right(sequence)`` of them. The
    rest are the chain's own, or wrong on purpose where there is no chain."""

    def __init__(self, texts: list[list[int]], prompts: list[list[int]], right: Any, chain: Any):
        self.texts, self.right, self.chain = texts, right, chain
        self.sequences = list(range(len(prompts)))
        self.chains: list[tuple[int, int, list[int]]] = []

    def keep(self, sequences: Tensor) -> None:
        self.sequences = [self.sequences[i] for i in sequences.tolist()]
        if self.chain is not None:
            self.chain.keep(sequences)

    def propose(self, verified: Any) -> Tensor:
        own = None if self.chain is None else self.chain.propose(verified)
        newest = verified.start + verified.last + 1
        rows = []
        for row, (sequence, at) in enumerate(zip(self.sequences, newest.tolist(), strict=True)):
            text = self.texts[sequence]
            following = (text[at + 1 :] + [0] * DRAFTS)[:DRAFTS]
            rest = [(x + 1) % VOCAB for x in following] if own is None else own[row].tolist()
            if own is not None and at < len(text) - 1:
                self.chains.append((sequence, at, rest))
            right = self.right(sequence)
            rows.append(following[:right] + rest[right:])
        return torch.tensor(rows)


def decode(rank: int, world: int, directory: str, case: Case, prompts: list[list[int]]) -> Any:
    """Greedy answers, speculative answers with ragged acceptance, and what the chain drafted."""
    frozen, draft = build(world, directory, case)
    from megatron_eagle.decode.base import CachedBase
    from megatron_eagle.decode.chain import DraftChain
    from megatron_eagle.decode.greedy import greedy_steps
    from megatron_eagle.decode.interleave import interleave
    from megatron_eagle.decode.speculative import ChainCounts, speculative_steps

    base = CachedBase(frozen)
    (free,) = interleave([greedy_steps(base, prompts, NEW_TOKENS)])
    stops = [free[0][5], free[1][9]]
    result: dict[str, Any] = {"free": free, "stops": stops}
    (result["greedy"],) = interleave([greedy_steps(base, prompts, NEW_TOKENS, stops)])
    texts = [p + a for p, a in zip(prompts, result["greedy"], strict=True)]
    hidden: list[Tensor] = []
    rng = random.Random(1)
    proposers = []

    def ragged(capacity: int) -> Prompted:
        chain = DraftChain(draft, base, DRAFTS, capacity)
        choose = chain._choose
        chain._choose = lambda output: (hidden.append(output[0]), choose(output))[1]
        proposers.append(Prompted(texts, prompts, lambda _: rng.randint(0, DRAFTS), chain))
        return proposers[-1]

    counts = ChainCounts(DRAFTS)
    steps = speculative_steps(base, ragged, prompts, NEW_TOKENS, DRAFTS, counts, stops)
    (result["answers"],) = interleave([steps])
    result["counts"] = vars(counts)
    result["chains"] = proposers[0].chains
    result["first logits"] = torch.stack(hidden[:DRAFTS], dim=1) @ draft.lm_head().t()
    for name, right in (("perfect", DRAFTS), ("hopeless", 0)):
        counts = ChainCounts(DRAFTS)
        longer = [p + a for p, a in zip(prompts, free, strict=True)]

        def known(capacity: int, right: int = right, texts: Any = longer) -> Prompted:
            return Prompted(texts, prompts, lambda _: right, None)

        # 21 tokens: one of the prefill and 5 whole verifications, all of them in the known text.
        steps = speculative_steps(base, known, prompts, 21, DRAFTS, counts)
        (answers,) = interleave([steps])
        result[name] = (answers == [a[:21] for a in free], vars(counts))
    return result


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def decoded(request: pytest.FixtureRequest, setup: Setup) -> list[dict[str, Any]]:
    """What every rank returned."""
    return run_distributed(decode, request.param, setup.base, setup.case, setup.prompts)


def test_greedy_is_the_base_s_own_greedy(setup: Setup, decoded: list[dict[str, Any]]) -> None:
    for prompt, answer in zip(setup.prompts, decoded[0]["free"], strict=True):
        assert len(answer) == NEW_TOKENS
        with torch.no_grad():
            logits = setup.model(torch.tensor([prompt + answer])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_speculative_equals_greedy(decoded: list[dict[str, Any]]) -> None:
    for result in decoded:
        assert result["answers"] == result["greedy"] == decoded[0]["greedy"]
    lengths = {len(answer) for answer in decoded[0]["greedy"]}
    assert len(lengths) > 2, "some answers must end early, at different lengths"


def test_every_chain_is_the_reference_s(setup: Setup, decoded: list[dict[str, Any]]) -> None:
    """Also after ragged acceptance and after sequences left the batch."""
    result = decoded[0]
    texts = [p + a for p, a in zip(setup.prompts, result["greedy"], strict=True)]
    assert len(result["chains"]) > 60
    for sequence, newest, drafted in result["chains"]:
        prefix = torch.tensor(texts[sequence][: newest + 1])
        ids, _ = draft_chain(setup.reference, prefix, captured(setup, prefix), DRAFTS)
        assert ids.tolist() == drafted, f"prompt {sequence}, after {newest}"


def test_the_chain_s_logits_are_the_reference_s(
    setup: Setup, decoded: list[dict[str, Any]]
) -> None:
    found = torch.cat([result["first logits"] for result in decoded], dim=-1)
    for sequence, prompt in enumerate(setup.prompts):
        prefix = torch.tensor([*prompt, decoded[0]["greedy"][sequence][0]])
        _, logits = draft_chain(setup.reference, prefix, captured(setup, prefix), DRAFTS)
        assert (found[sequence] - logits).abs().max() < 1e-4 * logits.abs().max()


def captured(setup: Setup, prefix: Tensor) -> Tensor:
    """[n, A * H] by Hugging Face, for all but the last of n + 1 tokens."""
    with torch.no_grad():
        states = setup.model(prefix[None, :-1], output_hidden_states=True).hidden_states
    return torch.cat([states[layer + 1][0] for layer in AUX_LAYERS], dim=-1)


def test_a_perfect_draft_is_accepted_whole_and_a_hopeless_one_never(
    decoded: list[dict[str, Any]],
) -> None:
    equal, counts = decoded[0]["perfect"]
    assert equal
    every = [100] * 3
    assert counts == {
        "verifications": 100, "reached": every, "accepted": every, "server_accepted": every
    }  # fmt: skip
    equal, counts = decoded[0]["hopeless"]
    assert equal
    none = [0] * 3
    assert counts == {
        "verifications": 400, "reached": [400, 0, 0], "accepted": none, "server_accepted": none
    }  # fmt: skip


def report_on_a_wrong_answer(
    rank: int, world: int, directory: str, case: Case, prompts: list[list[int]]
) -> Any:
    base, draft = build(world, directory, case)
    from megatron_eagle.decode import acceptance

    decode_truly = acceptance.speculative_steps

    def decode_wrongly(*args: Any) -> Any:
        answers = yield from decode_truly(*args)
        answers[0][4] = (answers[0][4] + 1) % VOCAB  # of the shortest prompt in the batch
        return answers

    acceptance.speculative_steps = decode_wrongly
    report = acceptance.evaluate_acceptance(base, draft, prompts, max_new_tokens=8)
    return report.as_dict()


def test_a_wrong_answer_is_named(setup: Setup) -> None:
    prompts = setup.prompts[:4]
    report = run_distributed(report_on_a_wrong_answer, 1, setup.base, setup.case, prompts)[0]
    assert not report["equal_to_greedy"]
    (mismatch,) = report["mismatches"]
    shortest = min(range(4), key=lambda i: len(prompts[i]))
    assert (mismatch["prompt"], mismatch["index"]) == (shortest, 4)
    assert mismatch["speculative"] == (mismatch["greedy"] + 1) % VOCAB
    assert mismatch["logit_gap"] > 0


def save(rank: int, world: int, directory: str, case: Case, target: str) -> None:
    _, draft = build(world, directory, case)
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(draft.sharded_state_dict(prefix="draft."), target)


def test_the_tool_reads_a_draft_saved_in_another_layout(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "draft" / "iter_0000001").mkdir(parents=True)
    target = str(tmp_path / "draft" / "iter_0000001")
    run_distributed(save, 2, setup.base, setup.case, target)
    (tmp_path / "draft" / TRACKER_NAME).write_text("1")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": p}) + "\n" for p in setup.prompts))
    figures = []
    for ranks in (1, 2):
        words = [
            *("--base", setup.base, "--draft", tmp_path / "draft", "--prompts", prompts),
            *("--output", tmp_path / f"{ranks}.json", "--max-new-tokens", "12"),
            *("--batch-size", "7", "--limit", "8"),
        ]
        environment = {**os.environ, **recommended_environment(ranks), "PYTHONPATH": str(ROOT)}
        tool = ROOT / "tools/eval_acceptance.py"
        status, printed = run_forked(tool, ranks, list(map(str, words)), environment, timeout=120)
        assert status == 0, printed[-2000:]
        assert "equal the greedy ones" in printed
        figures.append(json.loads((tmp_path / f"{ranks}.json").read_text()))
    for name in ("accepted_length", "acceptance", "verifications", "tokens", "equal_to_greedy"):
        assert figures[0][name] == figures[1][name]
    assert figures[0]["prompts"] == 8 and figures[0]["tokens"] > 8
