"""Greedy speculative decoding: the draft proposes a chain, one base forward verifies it.

The base runs the newest token and its k drafts, k + 1 tokens. Drafts are accepted up to the first
that differs from the base's own greedy token, which then takes its place. With k = 3::

    text so far          ... the
    drafts                   cat  sat  on
    tokens run          the  cat  sat  on
    base's next token   cat  sat  in   a
    hits                yes  yes  no
    appended            cat  sat  in          2 accepted drafts, 1 token of the base

``ChainCounts`` adds 1 to ``verifications``, [1, 1, 1] to ``reached`` (a draft is reached if all
before it are hits) and [1, 1, 0] to ``accepted``. The accepted length of this verification is
1 + 2 = 3, the number of tokens appended. "in" is the newest token of the next verification; "a",
which follows a rejected draft, is dropped. If "cat" were a stop id, the answer would end there, and
``reached`` and ``accepted`` would get [1, 0, 0], and ``server_accepted`` still [1, 1, 0]: a server
counts the whole chain that it verified.

B sequences, n tokens of each in a forward, k drafts, H hidden size, A aux layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_eagle.decode.base import CachedBase
from megatron_eagle.decode.chain import Verified
from megatron_eagle.decode.greedy import select_tokens
from megatron_eagle.decode.interleave import Steps
from megatron_eagle.decode.sequences import Sequences


class Proposer(Protocol):
    """Source of drafts: ``DraftChain``, or a stand-in with known answers."""

    def propose(self, verified: Verified) -> Tensor:
        """Return drafts [B, k] that follow the newest tokens."""

    def keep(self, sequences: Tensor) -> None:
        """Keep only the sequences of these indices."""


class ChainCounts:
    """Counts over all verifications, in total and per chain position.

    reached: verifications in which all earlier drafts were accepted and none ended the sequence.
    accepted: those of them that also accepted the draft at this position.
    server_accepted: accepted drafts per position as servers count them: also those behind a draft
        that ends the sequence.

    Every verification of a sequence counts in full, also the last one, whose accepted drafts may
    lie beyond the token limit. The token chosen after the prefill counts as no verification.
    """

    def __init__(self, length: int) -> None:
        self.verifications = 0
        self.reached = [0] * length
        self.accepted = [0] * length
        self.server_accepted = [0] * length

    def add(self, hits: Tensor, is_stop: Tensor, growing: Tensor) -> None:
        """Add one verification of each sequence that ``growing`` [B] marks.

        ``hits`` [B, k]: whether the base agrees with each draft. ``is_stop`` [B, k]: whether the
        base's token at that position ends the sequence.
        """
        accepted = hits.long().cumprod(1)
        goes_on = accepted * (1 - is_stop.long().cumsum(1).clamp(max=1))
        reached = torch.cat([torch.ones_like(accepted[:, :1]), goes_on[:, :-1]], dim=1)
        self.verifications += int(growing.sum())
        for store, values in (
            (self.reached, reached),
            (self.accepted, reached * accepted),
            (self.server_accepted, accepted),
        ):
            for position, count in enumerate((values * growing.unsqueeze(1)).sum(0).tolist()):
                store[position] += count

    def merge(self, other: ChainCounts) -> None:
        """Add the counts of other prompts."""
        self.verifications += other.verifications
        self.reached = [a + b for a, b in zip(self.reached, other.reached, strict=True)]
        self.accepted = [a + b for a, b in zip(self.accepted, other.accepted, strict=True)]
        pairs = zip(self.server_accepted, other.server_accepted, strict=True)
        self.server_accepted = [a + b for a, b in pairs]


def speculative_steps(
    base: CachedBase,
    make_proposer: Callable[[int], Proposer],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    draft_tokens: int,
    counts: ChainCounts,
    stop_ids: Iterable[int] = (),
) -> Steps[list[list[int]]]:
    """Continue ``prompts`` speculatively in one batch; return the answers' token ids.

    The answers are the greedy ones, whatever is drafted. ``make_proposer(capacity)`` returns the
    source of ``draft_tokens`` drafts at a time, at positions below ``capacity``. Adds to
    ``counts``. A generator for ``interleave.interleave``: it yields around every forward.
    """
    sequences = Sequences(prompts, max_new_tokens, stop_ids, base.device, spare=draft_tokens)
    cache = base.new_cache(sequences.capacity)
    forward = base.begin(*sequences.padded_prompts(), cache)
    yield
    verified = _after_prefill(base, sequences, *base.finish(forward))
    proposer = make_proposer(sequences.capacity)
    while not sequences.finished:
        kept = sequences.compact()
        if kept is not None:
            cache.keep(kept)
            proposer.keep(kept)
            verified = verified.keep(kept)
        drafts = proposer.propose(verified)
        yield
        forward = base.begin(*_verification_inputs(sequences, drafts), cache)
        yield
        verified = _accept(base, sequences, drafts, counts, *base.finish(forward))
    return sequences.answers()


def _after_prefill(
    base: CachedBase, sequences: Sequences, features: Tensor, final: Tensor
) -> Verified:
    """Append the first token of each answer, from features [n, B, A * H] and final hidden states
    [n, B, H] of the prompts."""
    lengths = sequences.lengths.clone()
    chosen = base.argmax(select_tokens(final, lengths - 1))
    sequences.append(chosen.unsqueeze(1), torch.ones_like(lengths))
    following = sequences.tokens[:, 1 : features.shape[0] + 1]
    return Verified(features, following, torch.zeros_like(lengths), lengths - 1)


def _verification_inputs(sequences: Sequences, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the newest token and ``drafts`` [B, k], and their positions, [B, k + 1] each."""
    start = (sequences.lengths - 1).unsqueeze(1)
    offsets = torch.arange(drafts.shape[1] + 1, device=drafts.device)
    return torch.cat([sequences.tokens.gather(1, start), drafts], dim=1), start + offsets


def _accept(
    base: CachedBase,
    sequences: Sequences,
    drafts: Tensor,
    counts: ChainCounts,
    features: Tensor,
    final: Tensor,
) -> Verified:
    """Append the accepted ones of ``drafts`` [B, k] and the base's token behind them.

    features [k + 1, B, A * H] and final [k + 1, B, H] are of the verification's forward.
    """
    start = sequences.lengths - 1
    greedy = base.argmax(final).t()  # [B, k + 1]: the base's own token after each position
    hits = greedy[:, :-1] == drafts
    accepted = hits.long().cumprod(1).sum(1)
    counts.add(hits, sequences.is_stop(greedy[:, :-1]), sequences.growing)
    sequences.append(greedy, accepted + 1)
    # No more than was appended counts of a sequence that ended: its chain must fit into the cache.
    last = (sequences.lengths - 2 - start).clamp(min=0)
    return Verified(features, greedy, start, last)
