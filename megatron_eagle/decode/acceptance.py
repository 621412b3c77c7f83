"""How much a draft is worth: accepted length, acceptance per chain position, measured speed.

Every figure comes with its check: the speculative output is the greedy output, token by token.
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
from megatron_eagle.decode.chain import DraftChain
from megatron_eagle.decode.greedy import greedy_steps
from megatron_eagle.decode.interleave import Steps, together
from megatron_eagle.decode.prompt_shards import PromptShare
from megatron_eagle.decode.speculative import ChainCounts, speculative_steps
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.errors import UserError
from megatron_eagle.pipeline.exchange import StageExchange
from megatron_eagle.teacher.base import FrozenBase

EVERYTHING = PromptShare()
Batch = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Mismatch:
    """Where the speculative output of prompt ``prompt`` leaves the greedy one: answer token
    ``index``, the two ids (None: the answer has ended), and by how much the base prefers the
    greedy one when asked alone, without a cache (about 1e-5 is a tie)."""

    prompt: int
    index: int
    greedy: int | None
    speculative: int | None
    logit_gap: float | None


@dataclass
class AcceptanceReport:
    """Counts as :class:`~megatron_eagle.decode.speculative.ChainCounts` defines them; seconds
    include the prefill. ``tokens`` are the answers' tokens, first ones and stop ids included."""

    counts: ChainCounts
    prompts: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"greedy": 0.0, "speculative": 0.0})
    mismatches: list[Mismatch] = field(default_factory=list)

    @property
    def accepted_length(self) -> float:
        """tau: 1 + accepted drafts per verification, the mean over all verifications of all
        prompts (a prompt that needs more verifications weighs more)."""
        return 1.0 + sum(self.counts.accepted) / max(1, self.counts.verifications)

    @property
    def unconditional(self) -> list[float]:
        """Per chain position: accepted drafts / all verifications."""
        return [a / max(1, self.counts.verifications) for a in self.counts.accepted]

    @property
    def conditional(self) -> list[float]:
        """Per chain position: accepted drafts / verifications whose earlier drafts were all
        accepted."""
        pairs = zip(self.counts.accepted, self.counts.reached, strict=True)
        return [a / max(1, r) for a, r in pairs]

    def merge(self, other: AcceptanceReport) -> None:
        """Add what was found of other prompts at the same time."""
        self.counts.merge(other.counts)
        self.prompts += other.prompts
        self.tokens += other.tokens
        self.seconds = {name: max(s, other.seconds[name]) for name, s in self.seconds.items()}
        self.mismatches += other.mismatches

    def as_dict(self) -> dict[str, Any]:
        """All figures, JSON-serialisable."""
        return {
            "accepted_length": self.accepted_length,
            "acceptance": self.unconditional,
            "conditional_acceptance": self.conditional,
            "verifications": self.counts.verifications,
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
    share: PromptShare = EVERYTHING,
    max_new_tokens: int = 64,
    draft_tokens: int = 3,
    batch_size: int = 16,
    stop_ids: Iterable[int] = (),
    compare: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> AcceptanceReport:
    """Continue this rank's ``share`` of ``prompts`` greedily, alone and with ``draft`` (None:
    alone only), and compare; without ``compare`` with the draft only.

    ``base`` and ``draft`` are as training holds them, in any layout; ``exchange`` joins the base's
    pipeline stages, of which each has a batch of its own under way. All ranks of the world call
    this with the same arguments but for the share, and get the same report. Raises
    ``ValueError`` for an answer that would leave the base's positions.
    """
    assert compare or draft is not None
    check_lengths(prompts, max_new_tokens, base.gpt.max_sequence_length)
    stops, report = list(stop_ids), AcceptanceReport(ChainCounts(draft_tokens))
    cached, plain = CachedBase(base, exchange), CachedBase(base, exchange, captures=False)

    def greedy(batch: Batch) -> Steps[list[list[int]]]:
        return greedy_steps(plain, batch, max_new_tokens, stops)

    def speculative(batch: Batch) -> Steps[list[list[int]]]:
        assert draft is not None
        chain_of = partial(DraftChain, draft, cached, draft_tokens)
        return speculative_steps(
            cached, chain_of, batch, max_new_tokens, draft_tokens, report.counts, stops
        )

    ways = [("greedy", greedy)] if compare else []
    ways += [("speculative", speculative)] if draft is not None else []
    order = share.take(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
    for wave in _waves(order, batch_size, cached.exchange.stages):
        indices, answers = list(chain.from_iterable(wave)), []
        for name, steps in ways:
            started = time.perf_counter()
            found = together(steps([prompts[i] for i in batch]) for batch in wave)
            report.seconds[name] += time.perf_counter() - started
            answers.append(list(chain.from_iterable(found)))
        report.prompts += len(indices)
        report.tokens += sum(map(len, answers[0]))
        for i, expected, other in zip(indices, answers[0], answers[-1], strict=True):
            if expected != other:
                report.mismatches.append(_mismatch(plain, i, prompts[i], expected, other))
        progress(f"{report.prompts} of {len(order)} prompts, {report.tokens} tokens")
    whole, *others = share.gather(report)
    for another in others:
        whole.merge(another)
    return whole


def _waves(order: Sequence[int], batch_size: int, stages: int) -> list[list[Sequence[int]]]:
    """Batches of at most ``batch_size`` prompts, as many at a time as there are stages."""
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
    base: CachedBase, prompt: int, tokens: Sequence[int], greedy: list[int], found: list[int]
) -> Mismatch:
    pairs = enumerate(zip(greedy, found, strict=False))
    shorter = min(len(greedy), len(found))
    index = next((i for i, (a, b) in pairs if a != b), shorter)
    if index == shorter:
        first_id, second_id = (a[index] if index < len(a) else None for a in (greedy, found))
        return Mismatch(prompt, index, first_id, second_id, logit_gap=None)
    prefix = torch.tensor([[*tokens, *greedy[:index]]], device=base.device)
    positions = torch.arange(prefix.shape[1], device=base.device).unsqueeze(0)
    _, final = base.run(prefix, positions, base.new_cache(prefix.shape[1]))
    pair = torch.tensor([greedy[index], found[index]], device=base.device)
    first, second = base.logits_of(final[-1, 0], pair).tolist()
    return Mismatch(prompt, index, greedy[index], found[index], first - second)
