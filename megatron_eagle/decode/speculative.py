"""Greedy speculative decoding: the draft proposes a chain, one base forward verifies it.

The base runs the newest token and its k drafts as k + 1 rows. Drafts are accepted as long as each
is what the base itself would have said; behind the last accepted one comes the base's own token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_eagle.decode.base import CachedBase
from megatron_eagle.decode.chain import Verified
from megatron_eagle.decode.greedy import select_rows
from megatron_eagle.decode.interleave import Steps
from megatron_eagle.decode.sequences import Sequences


class Proposer(Protocol):
    """What drafts: :class:`~megatron_eagle.decode.chain.DraftChain`."""

    def propose(self, verified: Verified) -> Tensor: ...

    def keep(self, sequences: Tensor) -> None: ...


class ChainCounts:
    """Counts per chain position: ``reached``, verifications in which all earlier drafts were
    accepted and none of them ended the sequence; ``accepted``, of those, accepted here.

    Every verification of a sequence counts in full, also the last one, whose accepted drafts may
    lie beyond the token limit. The token that a prefill gives is no verification.
    """

    def __init__(self, length: int) -> None:
        self.verifications = 0
        self.reached = [0] * length
        self.accepted = [0] * length

    def add(self, hits: Tensor, is_stop: Tensor, growing: Tensor) -> None:
        """hits, is_stop [B, length]: whether the base agrees with each draft, and whether what the
        base says there ends the sequence; growing [B]: which sequences count."""
        accepted = hits.long().cumprod(1)
        goes_on = accepted * (1 - is_stop.long().cumsum(1).clamp(max=1))
        reached = torch.cat([torch.ones_like(accepted[:, :1]), goes_on[:, :-1]], dim=1)
        self.verifications += int(growing.sum())
        for store, values in ((self.reached, reached), (self.accepted, reached * accepted)):
            for position, count in enumerate((values * growing.unsqueeze(1)).sum(0).tolist()):
                store[position] += count

    def merge(self, other: ChainCounts) -> None:
        """Add the counts of other prompts."""
        self.verifications += other.verifications
        for mine, theirs in ((self.reached, other.reached), (self.accepted, other.accepted)):
            mine[:] = [a + b for a, b in zip(mine, theirs, strict=True)]


def speculative_steps(
    base: CachedBase,
    make_proposer: Callable[[int], Proposer],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    draft_tokens: int,
    counts: ChainCounts,
    stop_ids: Iterable[int] = (),
) -> Steps[list[list[int]]]:
    """The greedy continuation of each prompt, all prompts in one batch; adds to ``counts``. For
    :func:`~megatron_eagle.decode.interleave.together`.

    ``make_proposer(capacity)`` gives what drafts ``draft_tokens`` tokens at a time.
    """
    sequences = Sequences(prompts, max_new_tokens, stop_ids, base.device, spare=draft_tokens)
    cache = base.new_cache(sequences.capacity)
    forward = base.begin(*sequences.padded_prompts(), cache)
    yield
    verified = _begun(base, sequences, *base.finish(forward))
    proposer = make_proposer(sequences.capacity)
    while not sequences.finished:
        kept = sequences.compact()
        if kept is not None:
            cache.keep(kept)
            proposer.keep(kept)
            verified = verified.keep(kept)
        drafts = proposer.propose(verified)
        yield
        forward = base.begin(*_questions(sequences, drafts), cache)
        yield
        verified = _judged(base, sequences, drafts, counts, *base.finish(forward))
    return sequences.answers()


def _begun(base: CachedBase, sequences: Sequences, features: Tensor, final: Tensor) -> Verified:
    """After the prompts' forward."""
    lengths = sequences.lengths.clone()
    chosen = base.argmax(select_rows(final, lengths - 1))
    sequences.append(chosen.unsqueeze(1), torch.ones_like(lengths))
    following = sequences.tokens[:, 1 : features.shape[0] + 1]
    return Verified(features, following, torch.zeros_like(lengths), lengths - 1)


def _questions(sequences: Sequences, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """The newest token and ``drafts`` [B, k], and their positions, [B, k + 1] each."""
    start = (sequences.lengths - 1).unsqueeze(1)
    rows = torch.arange(drafts.shape[1] + 1, device=drafts.device)
    return torch.cat([sequences.tokens.gather(1, start), drafts], dim=1), start + rows


def _judged(
    base: CachedBase,
    sequences: Sequences,
    drafts: Tensor,
    counts: ChainCounts,
    features: Tensor,
    final: Tensor,
) -> Verified:
    """After the forward of the k + 1 rows: append what holds of ``drafts`` [B, k]."""
    start = sequences.lengths - 1
    said = base.argmax(final).t()  # [B, k + 1]: the base's own token after each row
    hits = said[:, :-1] == drafts
    accepted = hits.long().cumprod(1).sum(1)
    counts.add(hits, sequences.is_stop(said[:, :-1]), sequences.growing)
    sequences.append(said, accepted + 1)
    # Of a sequence that ended, no more than was appended: its chain must stay in the cache.
    last = (sequences.lengths - 2 - start).clamp(min=0)
    return Verified(features, said, start, last)
