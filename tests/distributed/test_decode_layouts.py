"""Greedy and speculative decoding give the same tokens and counts in every parallel layout."""

from __future__ import annotations

import dataclasses
import random
import time
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eagle.checkpoint.directory import load_base_json
from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.draft_fixture import Case, draft_spec, load_reference_weights
from tests.helpers.pipeline_fixture import PipelineCase, build_pipeline
from tests.helpers.tiny_hf import SIZES, make_base
from tests.reference.eagle3 import ReferenceConfig, ReferenceEagle3

LAYERS, CAPTURED, NEW_TOKENS, DRAFTS, VOCAB = 7, (0, 3, 6), 16, 3, SIZES["vocab_size"]
slow = pytest.mark.slow


@dataclass(frozen=True)
class Setup:
    """A base, a random draft over the ids that its answers have most, prompts, and the answers
    that transformers gives."""

    base: str
    draft: Case
    prompts: list[list[int]]
    answers: list[list[int]]
    stops: list[int]


def make_setup(folder: Path, family: str, **fields: Any) -> Setup:
    model = make_base(folder / "hf", family, num_hidden_layers=LAYERS, **fields)
    import_base(folder / "hf", folder / "base")
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))] for _ in range(11)]
    free = [greedy(model, prompt) for prompt in prompts]
    stop = free[0][5]
    answers = [a[: a.index(stop) + 1] if stop in a else a for a in free]
    common = [token for token, _ in Counter(chain.from_iterable(answers)).most_common(8)]
    ids = torch.tensor(sorted(common))
    config = ReferenceConfig(
        hidden_size=SIZES["hidden_size"], target_hidden_size=SIZES["hidden_size"],
        intermediate_size=SIZES["intermediate_size"], num_heads=8, num_kv_heads=4, head_dim=8,
        vocab_size=VOCAB, draft_vocab_size=8, rms_eps=1e-5,
    )  # fmt: skip
    embedding = model.get_input_embeddings().weight.detach()
    torch.manual_seed(3)
    reference = ReferenceEagle3(config, embedding, ids)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0.0, 0.2).add_(1.0 if parameter.dim() == 1 else 0.0)
    none = torch.empty(0)
    weights = {name: p.detach().clone() for name, p in reference.named_parameters()}
    case = Case(config, weights, ids, embedding, embedding, none, none, none, none)
    return Setup(str(folder / "base"), case, prompts, answers, [stop])


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tmp_path_factory.mktemp("dense"), "llama")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tmp_path_factory.mktemp("experts"), "mixtral", head_dim=8)


def evaluate(rank: int, world: int, setup: Setup, layout: dict[str, Any]) -> dict[str, Any]:
    """The report, and the answers by prompt, of modules loaded as the tool does it; with "sp", of
    a model as training builds it."""
    if layout.get("sequence_parallel"):
        first = 3 if layout.get("pp") else None
        draft_case = dataclasses.replace(setup.draft, sequence_parallel=True)
        case = PipelineCase(draft_case, setup.base, CAPTURED, [], first=first, **layout)
        model, _, groups = build_pipeline(case)
        base, draft, exchange = model.module.base, model.module.draft, model.module.exchange
    else:
        base, draft, exchange, groups = load(setup, layout)
    from megatron_eagle.compat import get_cuda_rng_tracker
    from megatron_eagle.decode import acceptance
    from megatron_eagle.decode.prompt_shards import PromptShard, lockstep_groups

    def random_states() -> list[torch.Tensor]:
        tracked = get_cuda_rng_tracker().get_states()
        return [torch.get_rng_state(), *(tracked[name].clone() for name in sorted(tracked))]

    states = random_states()
    answers: dict[int, list[int]] = {}
    decode = acceptance.speculative_steps

    def spying_decode(base: Any, proposer: Any, batch: Any, *rest: Any) -> Any:
        found = yield from decode(base, proposer, batch, *rest)
        answers.update(zip([setup.prompts.index(p) for p in batch], found, strict=True))
        return found

    acceptance.speculative_steps = spying_decode
    shard = PromptShard.of(lockstep_groups(groups))
    report = acceptance.evaluate_acceptance(
        base, draft, setup.prompts, exchange=exchange, shard=shard, max_new_tokens=NEW_TOKENS,
        draft_tokens=DRAFTS, batch_size=4, stop_ids=setup.stops,
    )  # fmt: skip
    figures = {k: v for k, v in report.as_dict().items() if "second" not in k}
    untouched = all(a.equal(b) for a, b in zip(states, random_states(), strict=True))
    return {"figures": figures, "answers": answers, "shards": shard.count, "untouched": untouched}


def load(setup: Setup, layout: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    groups = megatron_parallel(**layout)
    from megatron_eagle.decode.load import DraftCheckpointInfo, fresh_draft, load_base
    from megatron_eagle.draft.metadata import encode_metadata
    from megatron_eagle.hf.draft.info import DraftInfo
    from megatron_eagle.pipeline.exchange import StageExchange

    info = load_base_json(setup.base)
    base = load_base(setup.base, info, groups, CAPTURED)
    exchange = StageExchange.of(base, groups.pp)
    spec = draft_spec(setup.draft.config, CAPTURED, setup.draft.vocab_ids.numel())
    about = DraftCheckpointInfo(
        DraftInfo(spec, info, DRAFTS), setup.draft.vocab_ids, encode_metadata({})
    )
    draft = fresh_draft(about, base, exchange)
    load_reference_weights(draft, setup.draft)
    return base, draft, exchange, groups


@pytest.fixture(scope="module")
def expected(dense: Setup, experts: Setup) -> dict[str, dict[str, Any]]:
    """What one rank reports."""
    return {
        name: run_distributed(evaluate, 1, setup, {})[0]
        for name, setup in (("dense", dense), ("experts", experts))
    }


def test_one_rank_gives_transformers_answers(
    dense: Setup, experts: Setup, expected: dict[str, dict[str, Any]]
) -> None:
    for name, setup in (("dense", dense), ("experts", experts)):
        found = expected[name]
        assert [found["answers"][i] for i in range(len(setup.prompts))] == setup.answers
        assert found["figures"]["equal_to_greedy"]
        assert found["figures"]["accepted_length"] > 1.05, "something must be accepted"
    assert len({len(answer) for answer in dense.answers}) > 1, "some answers must end early"


SP = {"tp": 2, "sequence_parallel": True}
LAYOUTS = [
    pytest.param("dense", 3, {"pp": 3}, 1, id="pp3-uneven"),
    pytest.param("dense", 2, {"cp": 2}, 2, id="cp2"),
    pytest.param("dense", 2, SP, 1, id="tp2-sp"),
    pytest.param("experts", 2, {"ep": 2}, 1, id="ep2"),
    pytest.param("dense", 2, {"pp": 2}, 1, id="pp2-uneven", marks=slow),
    pytest.param("dense", 2, {"tp": 2}, 1, id="tp2", marks=slow),
    pytest.param("dense", 2, {}, 2, id="dp2", marks=slow),
    pytest.param("dense", 4, {"pp": 4}, 1, id="pp4-uneven", marks=slow),
    pytest.param("dense", 4, {"tp": 2, "pp": 2}, 1, id="tp2-pp2", marks=slow),
    pytest.param("dense", 4, {**SP, "pp": 2}, 1, id="tp2-sp-pp2", marks=slow),
    pytest.param("dense", 4, {"pp": 2, "cp": 2}, 2, id="pp2-cp2", marks=slow),
    pytest.param("dense", 4, {"pp": 2}, 2, id="pp2-dp2", marks=slow),
    pytest.param("experts", 2, {"pp": 2}, 1, id="experts-pp2", marks=slow),
    pytest.param("experts", 4, {"tp": 2, "ep": 2}, 1, id="tp2-ep2", marks=slow),
    pytest.param("experts", 4, {"ep": 2}, 2, id="ep2-dp2", marks=slow),
    pytest.param("experts", 4, {"pp": 2, "ep": 2}, 1, id="pp2-ep2", marks=slow),
]


def record_stage(rank: int, world: int, setup: Setup) -> list[tuple[float, float]]:
    """When this pipeline stage ran its layers, made to last a given time."""
    base, draft, exchange, _ = load(setup, {"pp": world})
    from megatron_eagle.decode import base as decoding
    from megatron_eagle.decode.acceptance import evaluate_acceptance

    spans = []
    run_stage = decoding.CachedBase._run_stage

    def slow_stage(*args: Any) -> torch.Tensor:
        output = run_stage(*args)
        started = time.perf_counter()
        time.sleep(0.2)
        spans.append((started, time.perf_counter()))
        return output

    decoding.CachedBase._run_stage = slow_stage
    evaluate_acceptance(
        base,
        draft,
        setup.prompts[:4],
        exchange=exchange,
        max_new_tokens=6,
        draft_tokens=1,
        compare=False,
    )
    return spans


def test_no_stage_waits_for_all_the_others(dense: Setup) -> None:
    """The second stage runs one batch while the first runs the other; the clocks are the same."""
    first, second = run_distributed(record_stage, 2, dense)
    assert len(first) == len(second) >= 8
    together = sum(any(a < d and c < b for c, d in second) for a, b in first)
    assert together >= len(first) // 3


@pytest.mark.parametrize(("name", "world", "layout", "shards"), LAYOUTS)
def test_the_layout_does_not_change_an_answer(
    name: str, world: int, layout: dict[str, Any], shards: int,
    dense: Setup, experts: Setup, expected: dict[str, dict[str, Any]],
) -> None:  # fmt: skip
    setup = {"dense": dense, "experts": experts}[name]
    found = run_distributed(evaluate, world, setup, layout)
    answers: dict[int, list[int]] = {}
    for rank in found:
        assert rank["figures"] == expected[name]["figures"], "every rank reports all prompts"
        assert rank["shards"] == shards
        assert rank["untouched"], "no random number is drawn"
        for prompt, answer in rank["answers"].items():
            assert answer == setup.answers[prompt]
        answers |= rank["answers"]
    assert sorted(answers) == list(range(len(setup.prompts)))
    decoded = sum(len(rank["answers"]) for rank in found)
    assert decoded == len(setup.prompts) * world // shards, "no shard decodes another's"
