"""Drafting: extend the draft's trunk over the verified tokens, then draft a chain behind it.

The semantics of training's unroll. At trunk position p the draft reads the aux hidden states of
position p and the embedding of token x_{p+1}, with RoPE position p. Chain step t reads the previous
step's output and the embedding of the token just drafted, with RoPE position t further on. The
cache slot is the RoPE position, so trunk and chain are one causal sequence to the cache, and the
next trunk overwrites the chain.

B sequences, n tokens of each in a forward, H hidden size, A aux layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eagle.algorithms import Schedule
from megatron_eagle.decode.base import CachedBase
from megatron_eagle.decode.greedy import select_tokens
from megatron_eagle.decode.vocab_argmax import vocab_argmax
from megatron_eagle.draft.model import EagleDraft


@dataclass(frozen=True)
class Verified:
    """Tokens that the base has just verified, as the draft reads them.

    features [n, B, A * H]: aux hidden states of the positions from ``start`` [B] on (EAGLE-1: the
    final hidden state [n, B, H]), as ``CachedBase.finish`` returns them.
    next_tokens [B, n]: the token that follows each position.
    last [B]: index of the last valid one of the n positions.
    """

    features: Tensor
    next_tokens: Tensor
    start: Tensor
    last: Tensor

    def keep(self, sequences: Tensor) -> Verified:
        """Return a copy with only the sequences of these indices."""
        return Verified(
            self.features[:, sequences],
            self.next_tokens[sequences],
            self.start[sequences],
            self.last[sequences],
        )


class DraftChain:
    """Draft ``length`` tokens per sequence at a time, at positions below ``capacity``."""

    def __init__(self, draft: EagleDraft, base: CachedBase, length: int, capacity: int) -> None:
        assert length >= 1
        self.draft, self.base, self.length = draft, base, length
        self.cache = base.new_cache(capacity)

    def keep(self, sequences: Tensor) -> None:
        """Keep only the sequences of these indices."""
        self.cache.keep(sequences)

    def propose(self, verified: Verified) -> Tensor:
        """Extend the trunk and draft a chain: base ids [B, length], the same on every TP rank and
        pipeline stage.

        Collectives: those of ``length`` passes of the draft's layers (P-EAGLE: one), each with an
        embedding look-up and an argmax; one broadcast over the pipeline.
        """
        schedule = Schedule(
            in_turn=lambda: self._propose_sequential(verified),
            at_once=lambda: self._propose_parallel(verified),
        )
        return self.base.exchange.broadcast_last(self.draft.algorithm.run(schedule))

    def _propose_sequential(self, verified: Verified) -> Tensor:
        offsets = torch.arange(verified.next_tokens.shape[1], device=verified.start.device)
        output, hidden = self._step(
            self.draft.start(verified.features),
            verified.next_tokens,
            verified.start.unsqueeze(1) + offsets,
        )
        newest = select_tokens(hidden, verified.last).unsqueeze(0)
        position = (verified.start + verified.last).unsqueeze(1)
        drafted = [self._choose(select_tokens(output, verified.last).unsqueeze(0))]
        for step in range(1, self.length):
            output, newest = self._step(newest, drafted[-1], position + step)
            drafted.append(self._choose(output))
        return torch.cat(drafted, dim=1)

    def _propose_parallel(self, verified: Verified) -> Tensor:
        """Draft as P-EAGLE, in one pass: ``length`` - 1 mask tokens behind the last real one."""
        more = self.length - 1
        trunk = verified.next_tokens.shape[1]
        offsets = torch.arange(trunk + more, device=verified.start.device)
        last = verified.last.unsqueeze(1)
        real = offsets <= last  # [B, n + length - 1]
        tokens = torch.nn.functional.pad(verified.next_tokens, (0, more))
        mask_token = self.draft.spec.mask_token
        assert mask_token is not None
        tokens = torch.where(real, tokens, mask_token)
        hidden = torch.nn.functional.pad(self.draft.start(verified.features), (0, 0, 0, 0, 0, more))
        hidden = torch.where(real.t().unsqueeze(-1), hidden, self.draft.masked_start())
        # Padding behind the mask tokens repeats the position of the last of them.
        positions = verified.start.unsqueeze(1) + torch.minimum(offsets, last + more)
        output, _ = self._step(hidden, tokens, positions)
        drafts = [select_tokens(output, verified.last + step) for step in range(self.length)]
        return self._choose(torch.stack(drafts))

    def _step(self, hidden: Tensor, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Run the draft's layers on ``hidden`` [n, B, H] with ``tokens`` at ``positions`` [B, n].

        Returns the inputs of the LM head and of the next step, [n, B, H] each.
        """
        padding, count = self.base.padding, tokens.shape[1]
        tokens, positions = padding.pad(tokens, positions)
        self.cache.place(positions)
        output, fed_back = self.draft.step(
            self.base.embed(tokens),
            padding.scatter(hidden),
            self.draft.rotary(self.cache.capacity)[:, 0][positions.t()],
            self.cache,
        )
        return padding.gather(output, count), padding.gather(fed_back, count)

    def _choose(self, output: Tensor) -> Tensor:
        """Return the base ids [B, n] of the largest logits of ``output`` [n, B, H]."""
        draft = self.draft
        return vocab_argmax(output, draft.lm_head(), draft.shard_ids, draft.tp_group).t()
