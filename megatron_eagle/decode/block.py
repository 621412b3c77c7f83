"""Drafting of a block: project the verified rows into the context, then run the block behind them.

The semantics of training's blocks. The keys and values of context row p lie in the cache's slot p;
a block's rows are at positions a .. a + B - 1, in the slots of these, and see all slots below
a + B. They overwrite whatever an earlier block or rejected rows left there, and the next round's
context overwrites them.

B sequences, n verified tokens of each in a forward, b rows of a block, k drafts, H hidden size, A
aux layers, g key/value heads of this TP rank, d channels of a head, r rank of the Markov head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_eagle.decode.base import CachedBase
from megatron_eagle.decode.cache import KeyValueCache
from megatron_eagle.decode.chain import Verified
from megatron_eagle.decode.vocab_argmax import vocab_argmax
from megatron_eagle.draft.block import BlockDraft
from megatron_eagle.errors import UserError


class BlockCache(KeyValueCache):
    """Cache of a block draft's context and, behind it, of its newest block; an ``AttentionState``.

    Call ``place_block`` before every pass. ``draft`` projects the context inside the layers.
    """

    def __init__(self, draft: BlockDraft, capacity: int) -> None:
        super().__init__(capacity)
        self.draft = draft
        self._context = self._context_positions = self._angles = torch.empty(0)
        self._last = torch.empty(0)

    def place_block(
        self, context: Tensor, angles: Tensor, context_positions: Tensor, positions: Tensor
    ) -> None:
        """Set the next pass: new context rows c [n, B, H] with ``angles`` [n, B, 1, d] at
        ``context_positions`` [B, n], and a block whose rows, and then padding, are at ``positions``
        [B, n']."""
        self._context, self._angles = context, angles
        self._context_positions = context_positions
        self.place(positions)
        self._span = max(self._span, int(context_positions.max()) + 1)
        self._last = positions[:, self.draft.spec.slots - 1]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Store the context's keys and values of ``layer``, then the block's, then attend."""
        block = self._positions
        self._positions = self._context_positions
        parts = self.draft.context_key_value(layer, self._context, self._angles)
        for store, part in zip((self._keys, self._values), parts, strict=True):
            self._store(store, layer, part)
        self._positions = block
        return super().attend(layer, query, key, value, scale, window, sink)

    def _mask(self, dtype: torch.dtype, ratio: int, window: int | None) -> Tensor:
        """Return the additive mask [B, 1, ratio * n', span]: all slots up to the block's last."""
        if window not in self._biases:
            slots = torch.arange(self._span, device=self._positions.device)
            hidden = (slots > self._last.unsqueeze(-1)).unsqueeze(1)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            bias = bias.masked_fill_(hidden, float("-inf"))
            rows = ratio * self._positions.shape[1]
            self._biases[window] = bias.expand(-1, rows, -1).unsqueeze(1)
        return self._biases[window]


class BlockProposer:
    """Draft ``length`` tokens per sequence at a time, a prefix of a block, at positions below
    ``capacity``. Raises ``UserError`` for more drafts than a block has."""

    def __init__(self, draft: BlockDraft, base: CachedBase, length: int, capacity: int) -> None:
        check_draft_tokens(draft, length)
        self.draft, self.base, self.length = draft, base, length
        spare = draft.spec.slots + base.padding.spare
        self.cache = BlockCache(draft, capacity + spare)

    def keep(self, sequences: Tensor) -> None:
        """Keep only the sequences of these indices."""
        self.cache.keep(sequences)

    def propose(self, verified: Verified) -> Tensor:
        """Take the verified rows into the context and draft: base ids [B, length], the same on
        every TP rank and pipeline stage.

        Collectives: those of one pass of the draft's layers, of an embedding look-up and of fc; an
        argmax, or with a Markov head one per draft, each with a look-up of W1; one broadcast over
        the pipeline.
        """
        newest = verified.next_tokens.gather(1, verified.last.unsqueeze(1))  # the anchor [B, 1]
        outputs = self._run(verified, newest)
        first = 0 if self.draft.algorithm.slot_zero_predicts else 1
        hidden = outputs[first : first + self.length]
        drafts = self._choose(hidden) if self.draft.markov is None else self._chain(hidden, newest)
        return self.base.exchange.broadcast_last(drafts)

    def _run(self, verified: Verified, newest: Tensor) -> Tensor:
        """Run the block behind the verified rows; return its outputs [b, B, H]."""
        draft, padding, slots = self.draft, self.base.padding, self.draft.spec.slots
        device = newest.device
        rows = torch.arange(verified.features.shape[0], device=device)
        context_positions = verified.start.unsqueeze(1) + rows
        anchor = (verified.start + verified.last + 1).unsqueeze(1)
        positions = anchor + torch.arange(slots, device=device)
        mask = newest.new_full((len(newest), slots - 1), int(draft.spec.mask_token or 0))
        tokens, positions = padding.pad(torch.cat([newest, mask], dim=1), positions)
        rotary = draft.rotary(self.cache.capacity)[:, 0]
        c = draft.hidden_norm(draft.project(verified.features))
        self.cache.place_block(c, rotary[context_positions.t()], context_positions, positions)
        embedded = self.base.embed(tokens)
        outputs = draft.run_blocks(embedded, rotary[positions.t()], self.cache)
        return padding.gather(outputs, slots)

    def _chain(self, hidden: Tensor, newest: Tensor) -> Tensor:
        """Choose from left to right: each slot of hidden [k, B, H] knows the token before it."""
        markov = self.draft.markov
        assert markov is not None
        head, _ = self.draft.joint_head()
        state = hidden.new_zeros(hidden.shape[1], markov.rank)
        drafted = [newest[:, 0]]
        for slot in hidden:
            output, state = markov.step(slot, markov.embed(drafted[-1]), state)
            rows = torch.cat([slot, output], dim=-1)
            drafted.append(vocab_argmax(rows, head, self.draft.shard_ids, self.draft.tp_group))
        return torch.stack(drafted[1:], dim=1)

    def _choose(self, hidden: Tensor) -> Tensor:
        """Return the base ids [B, k] of the largest logits of hidden [k, B, H]."""
        head, _ = self.draft.joint_head()
        return vocab_argmax(hidden, head, self.draft.shard_ids, self.draft.tp_group).t()


def check_draft_tokens(draft: BlockDraft, length: int) -> None:
    """Raise ``UserError`` for more drafts than a block has."""
    if length > draft.spec.block_drafts:
        raise UserError(
            f"<draft_tokens> {length}: the draft's block of {draft.spec.slots} slots drafts "
            f"{draft.spec.block_drafts} tokens"
        )
