"""Drafting: the draft's trunk over what the base has verified, then a chain of its own tokens.

Same semantics as training's unroll. Row p pairs the captured layers of position p with the
embedding of x_{p+1}, at RoPE position p. Chain step t feeds the newest row its own output and the
token just drafted, at the position t further on. Each row's key lies at its own RoPE position, so
trunk and chain are one causal sequence to the cache, and the next trunk overwrites the chain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eagle.algorithms import Schedule
from megatron_eagle.decode.base import CachedBase
from megatron_eagle.decode.greedy import select_rows
from megatron_eagle.decode.vocab_argmax import vocab_argmax
from megatron_eagle.draft.model import EagleDraft


@dataclass(frozen=True)
class Verified:
    """What the base has just verified of B sequences; only rows 0 .. ``last`` [B] count.

    features [n, B, A * H]: captured layers of the positions ``start`` [B] onwards, or what else
    the draft starts from (see :meth:`CachedBase.run`).
    next_tokens [B, n]: the token that follows each of them.
    """

    features: Tensor
    next_tokens: Tensor
    start: Tensor
    last: Tensor

    def keep(self, sequences: Tensor) -> Verified:
        """Only these of the B sequences."""
        return Verified(
            self.features[:, sequences],
            self.next_tokens[sequences],
            self.start[sequences],
            self.last[sequences],
        )


class DraftChain:
    """Proposes ``length`` tokens per sequence; positions stay below ``capacity``."""

    def __init__(self, draft: EagleDraft, base: CachedBase, length: int, capacity: int) -> None:
        assert length >= 1
        self.draft, self.base, self.length = draft, base, length
        self.cache = base.new_cache(capacity)

    def keep(self, sequences: Tensor) -> None:
        """Go on with only these of the B sequences."""
        self.cache.keep(sequences)

    def propose(self, verified: Verified) -> Tensor:
        """Extend the trunk and draft: base ids [B, length], the same on every TP rank and every
        pipeline stage.

        Collectives: ``length`` passes of the draft's layers (P-EAGLE: one), each with an embedding
        look-up and an argmax; one broadcast over the pipeline.
        """
        schedule = Schedule(
            in_turn=lambda: self._propose_in_turn(verified),
            at_once=lambda: self._propose_at_once(verified),
        )
        return self.base.exchange.broadcast_last(self.draft.algorithm.run(schedule))

    def _propose_in_turn(self, verified: Verified) -> Tensor:
        rows = torch.arange(verified.next_tokens.shape[1], device=verified.start.device)
        output, hidden = self._step(
            self.draft.start(verified.features),
            verified.next_tokens,
            verified.start.unsqueeze(1) + rows,
        )
        newest = select_rows(hidden, verified.last).unsqueeze(0)
        position = (verified.start + verified.last).unsqueeze(1)
        drafted = [self._choose(select_rows(output, verified.last).unsqueeze(0))]
        for step in range(1, self.length):
            output, newest = self._step(newest, drafted[-1], position + step)
            drafted.append(self._choose(output))
        return torch.cat(drafted, dim=1)

    def _propose_at_once(self, verified: Verified) -> Tensor:
        """P-EAGLE: behind the last verified row come mask rows, all in one pass."""
        known = verified.next_tokens.shape[1]
        more = self.length - 1
        rows = torch.arange(known + more, device=verified.start.device)
        last = verified.last.unsqueeze(1)
        real = rows <= last  # [B, n + length - 1]
        tokens = torch.nn.functional.pad(verified.next_tokens, (0, more))
        mask_token = self.draft.spec.mask_token
        assert mask_token is not None
        tokens = torch.where(real, tokens, mask_token)
        hidden = torch.nn.functional.pad(self.draft.start(verified.features), (0, 0, 0, 0, 0, more))
        hidden = torch.where(real.t().unsqueeze(-1), hidden, self.draft.masked_start())
        # Rows beyond the drafted ones repeat the last of them.
        positions = verified.start.unsqueeze(1) + torch.minimum(rows, last + more)
        output, _ = self._step(hidden, tokens, positions)
        drafts = [select_rows(output, verified.last + step) for step in range(self.length)]
        return self._choose(torch.stack(drafts))

    def _step(self, hidden: Tensor, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [n, B, H] with tokens [B, n] at positions [B, n] -> what the head and what the
        next step reads, [n, B, H] each."""
        rows, asked = self.base.rows, tokens.shape[1]
        tokens, positions = rows.padded(tokens, positions)
        self.cache.place(positions)
        output, fed_back = self.draft.step(
            self.base.embed(tokens),
            rows.cut(hidden),
            self.draft.rotary(self.cache.capacity)[:, 0][positions.t()],
            self.cache,
        )
        return rows.whole(output, asked), rows.whole(fed_back, asked)

    def _choose(self, output: Tensor) -> Tensor:
        """output [n, B, H] -> base ids [B, n]."""
        draft = self.draft
        return vocab_argmax(output, draft.lm_head(), draft.shard_ids, draft.tp_group).t()
