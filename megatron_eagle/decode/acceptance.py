"""Evaluation of a draft by decoding: accepted length, acceptance rate per chain position, speed.

The figures come with their check: speculative answers equal the greedy ones, token by token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch

from megatron_eagle.decode.base import CachedBase
from megatron_eagle.decode.block import BlockProposer, check_draft_tokens
from megatron_eagle.decode.chain import DraftChain
from megatron_eagle.decode.greedy import greedy_steps
from megatron_eagle.decode.interleave import Steps, interleave
from megatron_eagle.decode.prompt_shards import PromptShard
from megatron_eagle.decode.speculative import ChainCounts, Proposer, speculative_steps
from megatron_eagle.draft.block import BlockDraft
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.errors import UserError
from megatron_eagle.pipeline.exchange import StageExchange
from megatron_eagle.teacher.base import FrozenBase

ALL_PROMPTS = PromptShard()
Batch = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Mismatch:
    """First difference between the greedy and the speculative answer of prompt ``prompt``.

    index: the answer token that differs; ``greedy`` and ``speculative``: its two ids, None where an
    answer has ended.
    logit_gap: the greedy token's logit minus the other's, in one forward without a cache; about
    1e-5 is a tie.
    """

    prompt: int
    index: int
    greedy: int | None
    speculative: int | None
    logit_gap: float | None


@dataclass
class AcceptanceReport:
    """Result of an evaluation; ``counts`` as ``ChainCounts`` defines them.

    tokens: all tokens of the answers, the first ones and stop ids included.
    seconds: wall time of each way of decoding, prefill included.
    """

    counts: ChainCounts
    prompts: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"greedy": 0.0, "speculative": 0.0})
    mismatches: list[Mismatch] = field(default_factory=list)

    @property
    def accepted_length(self) -> float:
        """Return 1 + accepted drafts per verification, averaged over the verifications of all
        prompts: a prompt that needs more verifications weighs more."""
        return 1.0 + sum(self.counts.accepted) / max(1, self.counts.verifications)

    @property
    def server_accepted_length(self) -> float:
        """Return the accepted length by servers' counters, see ``ChainCounts``."""
        return 1.0 + sum(self.counts.server_accepted) / max(1, self.counts.verifications)

    @property
    def unconditional(self) -> list[float]:
        """Return the acceptance rate per chain position: accepted drafts / all verifications."""
        return [a / max(1, self.counts.verifications) for a in self.counts.accepted]

    @property
    def conditional(self) -> list[float]:
        """Return the rate per chain position: accepted drafts / verifications whose earlier drafts
        were all accepted."""
        pairs = zip(self.counts.accepted, self.counts.reached, strict=True)
        return [a / max(1, r) for a, r in pairs]

    def merge(self, other: AcceptanceReport) -> None:
        """Add the report on other prompts, decoded at the same time on other ranks."""
        self.counts.merge(other.counts)
        self.prompts += other.prompts
        self.tokens += other.tokens
        self.seconds = {name: max(s, other.seconds[name]) for name, s in self.seconds.items()}
        self.mismatches += other.mismatches

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, JSON-serialisable."""
        return {
            "accepted_length": self.accepted_length,
            "acceptance": self.unconditional,
            "conditional_acceptance": self.conditional,
            "verifications": self.counts.verifications,
            "accepted": list(self.counts.accepted),
            "server_accepted": list(self.counts.server_accepted),
            "server_accepted_length": self.server_accepted_length,
            "prompts": self.prompts,
            "tokens": self.tokens,
            **{f"{name}_seconds": seconds for name, seconds in self.seconds.items()},
            **{
                f"{name}_tokens_per_second": self.tokens / max(1e-9, seconds)
                for name, seconds in self.seconds.items()
            },
            "equal_to_greedy": not self.mismatches,
            "mismatches": [vars(mismatch) for mismatch in self.mismatches],
        }


def evaluate_acceptance(
    base: FrozenBase,
    draft: EagleDraft | None,
    prompts: Sequence[Sequence[int]],
    *,
    exchange: StageExchange | None = None,
    shard: PromptShard = ALL_PROMPTS,
    max_new_tokens: int = 64,
    draft_tokens: int = 3,
    batch_size: int = 16,
    stop_ids: Iterable[int] = (),
    compare: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> AcceptanceReport:
    """Answer ``prompts`` greedily and speculatively, and compare the answers.

    ``base`` and ``draft`` may have any layout. Collective over all ranks of the world: they pass
    the same arguments except ``shard`` and get the same report.

    Args:
        draft: None decodes with the base alone.
        prompts: token ids.
        exchange: between the base's pipeline stages, each of which has a batch of its own in
            flight.
        shard: the part of ``prompts`` that this rank decodes.
        compare: false decodes with the draft only, which must be given.

    Raises:
        UserError: an answer would exceed the base's positions, or a block draft has fewer tokens
            in a block than ``draft_tokens``.
    """
    assert compare or draft is not None
    check_lengths(prompts, max_new_tokens, base.gpt.max_sequence_length)
    if isinstance(draft, BlockDraft):
        check_draft_tokens(draft, draft_tokens)
    stops, report = list(stop_ids), AcceptanceReport(ChainCounts(draft_tokens))
    cached, plain = CachedBase(base, exchange), CachedBase(base, exchange, read_aux=False)

    def greedy(batch: Batch) -> Steps[list[list[int]]]:
        return greedy_steps(plain, batch, max_new_tokens, stops)

    def speculative(batch: Batch) -> Steps[list[list[int]]]:
        assert draft is not None
        proposer: Callable[[int], Proposer] = partial(DraftChain, draft, cached, draft_tokens)
        if isinstance(draft, BlockDraft):
            proposer = partial(BlockProposer, draft, cached, draft_tokens)
        return speculative_steps(
            cached, proposer, batch, max_new_tokens, draft_tokens, report.counts, stops
        )

    ways = [("greedy", greedy)] if compare else []
    ways += [("speculative", speculative)] if draft is not None else []
    order = shard.take(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
    for wave in _waves(order, batch_size, cached.exchange.stages):
        indices, answers = list(chain.from_iterable(wave)), []
        for name, steps in ways:
            started = time.perf_counter()
            results = interleave(steps([prompts[i] for i in batch]) for batch in wave)
            report.seconds[name] += time.perf_counter() - started
            answers.append(list(chain.from_iterable(results)))
        report.prompts += len(indices)
        report.tokens += sum(map(len, answers[0]))
        for i, expected, other in zip(indices, answers[0], answers[-1], strict=True):
            if expected != other:
                report.mismatches.append(_mismatch(plain, i, prompts[i], expected, other))
        progress(f"{report.prompts} of {len(order)} prompts, {report.tokens} tokens")
    total, *others = shard.gather(report)
    for other_shard in others:
        total.merge(other_shard)
    return total


def _waves(order: Sequence[int], batch_size: int, stages: int) -> list[list[Sequence[int]]]:
    """Cut ``order`` into batches of at most ``batch_size`` prompts, and the batches into waves of
    one per pipeline stage."""
    size = max(1, min(batch_size, -(-len(order) // stages)))
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    return [batches[first : first + stages] for first in range(0, len(batches), stages)]


def check_lengths(prompts: Sequence[Sequence[int]], max_new_tokens: int, positions: int) -> None:
    """Raise ``UserError`` for a prompt whose answer of ``max_new_tokens`` would exceed the base's
    ``positions``."""
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} is empty")
        if len(prompt) + max_new_tokens > positions:
            raise UserError(
                f"prompt {index}: {len(prompt)} tokens and <max_new_tokens> {max_new_tokens} "
                f"exceed the base's {positions} positions"
            )


@torch.no_grad()
def _mismatch(
    base: CachedBase, prompt: int, tokens: Sequence[int], greedy: list[int], other: list[int]
) -> Mismatch:
    """Locate the first difference and measure its logit gap. Collectives: those of a forward."""
    pairs = enumerate(zip(greedy, other, strict=False))
    shorter = min(len(greedy), len(other))
    index = next((i for i, (a, b) in pairs if a != b), shorter)
    if index == shorter:
        first_id, second_id = (a[index] if index < len(a) else None for a in (greedy, other))
        return Mismatch(prompt, index, first_id, second_id, logit_gap=None)
    prefix = torch.tensor([[*tokens, *greedy[:index]]], device=base.device)
    positions = torch.arange(prefix.shape[1], device=base.device).unsqueeze(0)
    _, final = base.run(prefix, positions, base.new_cache(prefix.shape[1]))
    pair = torch.tensor([greedy[index], other[index]], device=base.device)
    first, second = base.logits_of(final[-1, 0], pair).tolist()
    return Mismatch(prompt, index, greedy[index], other[index], first - second)
