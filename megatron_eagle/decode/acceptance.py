"""How much a draft is worth: accepted length, acceptance per chain position, measured speed.

Every figure comes with its check: the speculative output is the greedy output, token by token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from megatron_eagle.decode.base import CachedBase
from megatron_eagle.decode.cache import KeyValueCache
from megatron_eagle.decode.chain import DraftChain
from megatron_eagle.decode.greedy import greedy_decode
from megatron_eagle.decode.speculative import ChainCounts, speculative_decode
from megatron_eagle.draft.model import EagleDraft


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
    greedy_seconds: float = 0.0
    speculative_seconds: float = 0.0
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

    def as_dict(self) -> dict[str, Any]:
        """All figures, JSON-serialisable."""
        return {
            "accepted_length": self.accepted_length,
            "acceptance": self.unconditional,
            "conditional_acceptance": self.conditional,
            "verifications": self.counts.verifications,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "greedy_seconds": self.greedy_seconds,
            "speculative_seconds": self.speculative_seconds,
            "greedy_tokens_per_second": self.tokens / max(1e-9, self.greedy_seconds),
            "speculative_tokens_per_second": self.tokens / max(1e-9, self.speculative_seconds),
            "equal_to_greedy": not self.mismatches,
            "mismatches": [vars(mismatch) for mismatch in self.mismatches],
        }


def evaluate_acceptance(
    gpt: Any,
    draft: EagleDraft | None,
    prompts: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    aux_layers: Sequence[int],
    max_new_tokens: int = 64,
    draft_tokens: int = 3,
    batch_size: int = 16,
    stop_ids: Iterable[int] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> AcceptanceReport:
    """Continue ``prompts`` greedily, alone and with ``draft`` (None: alone only), and compare.

    ``gpt`` and ``draft`` are as training holds them, on one tensor-parallel group, all of whose
    ranks call this with the same arguments; ``vocab_size`` is the base's, unpadded. The report is
    the same on every rank but for the seconds. Raises ``ValueError`` under sequence parallelism
    and for an answer that would leave the base's positions.
    """
    _check_lengths(prompts, max_new_tokens, gpt.max_sequence_length)
    stops = list(stop_ids)
    base = CachedBase(gpt, vocab_size, aux_layers)
    plain = CachedBase(gpt, vocab_size)
    report = AcceptanceReport(ChainCounts(draft_tokens))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        batch = [prompts[i] for i in indices]
        started = time.perf_counter()
        greedy = greedy_decode(plain, batch, max_new_tokens, stops)
        report.greedy_seconds += time.perf_counter() - started
        report.prompts += len(batch)
        report.tokens += sum(map(len, greedy))
        if draft is not None:
            started = time.perf_counter()
            answers = speculative_decode(
                base,
                partial(DraftChain, draft, base, draft_tokens),
                batch, max_new_tokens, draft_tokens, report.counts, stops,
            )  # fmt: skip
            report.speculative_seconds += time.perf_counter() - started
            for i, expected, found in zip(indices, greedy, answers, strict=True):
                if expected != found:
                    report.mismatches.append(_mismatch(plain, i, prompts[i], expected, found))
        progress(f"{report.prompts} of {len(prompts)} prompts, {report.tokens} tokens")
    return report


def _check_lengths(prompts: Sequence[Sequence[int]], max_new_tokens: int, positions: int) -> None:
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty")
        if len(prompt) + max_new_tokens > positions:
            raise ValueError(
                f"prompt {index}: {len(prompt)} tokens and --max-new-tokens {max_new_tokens} "
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
    _, final = base.run(prefix, positions, KeyValueCache(prefix.shape[1]))
    pair = torch.tensor([greedy[index], found[index]], device=base.device)
    first, second = base.logits_of(final[-1, 0], pair).tolist()
    return Mismatch(prompt, index, greedy[index], found[index], first - second)
