"""The base with a key/value cache: tokens at given positions in, captured layers and ids out."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eagle.attention.mla import position_rotary
from megatron_eagle.decode.cache import KeyValueCache
from megatron_eagle.decode.token_padding import RowLayout
from megatron_eagle.decode.vocab_argmax import vocab_argmax
from megatron_eagle.parallel.vocab import VocabShard
from megatron_eagle.pipeline.exchange import StageExchange
from megatron_eagle.pipeline.links import Message
from megatron_eagle.teacher.base import FrozenBase
from megatron_eagle.teacher.embedding import token_embeddings


@dataclass(frozen=True)
class Forward:
    """A forward of ``rows`` rows whose part on this stage is done: its ``output``, this rank's rows
    of [n, B, H], on its way to the next stage by ``message``, and ``aux_hidden``, this
    stage's captured layers by id."""

    rows: int
    output: Tensor
    aux_hidden: dict[int, Tensor]
    message: Message | None


class CachedBase:
    """A frozen base whose layers attend through
    :class:`~megatron_eagle.attention.core.EagleCoreAttention`, in any layout but for the sequence:
    context-parallel ranks do not cut it, each decodes by itself.

    Its embedding and decoder are run directly, since ``GPTModel.forward`` knows positions 0 .. S-1
    only. All ranks of a tensor-parallel group and of the pipeline, whose stages ``exchange`` joins,
    call every method alike, and get the same. Without ``captures`` the captured layers are not
    collected.
    """

    def __init__(
        self, base: FrozenBase, exchange: StageExchange | None = None, captures: bool = True
    ) -> None:
        self.base, self.gpt = base, base.gpt
        self.captured = base.capture.layers if captures else ()
        self.tp_group = base.tp_group
        self.exchange = exchange or StageExchange(base)
        self.rows = RowLayout.of(base.config, base.tp_group)
        weight = base.output_weight
        self.device = weight.device
        shard = VocabShard.of(base.vocab_size, self.tp_group, weight.shape[0])
        self._head = weight.detach()[: shard.rows]
        self._ids = torch.arange(shard.start, shard.start + shard.rows, device=self.device)

    def new_cache(self, capacity: int) -> KeyValueCache:
        """For positions below ``capacity``."""
        return KeyValueCache(capacity + self.rows.spare)

    def embed(self, tokens: Tensor) -> Tensor:
        """What a draft reads of tokens [B, n]: this rank's rows of [n, B, H]. One all-reduce over
        TP, or a reduce-scatter under sequence parallelism."""
        return token_embeddings(
            tokens,
            self.base.embedding_weight,
            self.base.vocab_size,
            self.tp_group,
            self.base.config.sequence_parallel,
        )

    def rotary(self, positions: Tensor, capacity: int) -> Tensor:
        """RoPE angles [n, B, 1, d] of ``positions`` [B, n], all below ``capacity``."""
        # packed_seq: not cut over CP.
        return position_rotary(self.gpt)(capacity, packed_seq=True)[:, 0][positions.t()]

    def run(self, tokens: Tensor, positions: Tensor, cache: KeyValueCache) -> tuple[Tensor, Tensor]:
        """One forward, :meth:`begin` and :meth:`finish`."""
        return self.finish(self.begin(tokens, positions, cache))

    def begin(self, tokens: Tensor, positions: Tensor, cache: KeyValueCache) -> Forward:
        """Run this pipeline stage's layers on tokens and positions [B, n], and hand the output on.
        Collectives: those of the layers, and one message a link."""
        asked = tokens.shape[1]
        tokens, positions = self.rows.padded(tokens, positions)
        cache.place(positions)
        output = self._run_stage(tokens, positions, cache)
        return Forward(asked, output, self.base.capture.take(), self.exchange.send_hidden(output))

    def finish(self, forward: Forward) -> tuple[Tensor, Tensor]:
        """What a draft reads and the final hidden [n, B, H]. A draft reads the captured layers
        [n, B, A * H], or if none are, the final hidden (EAGLE-1). Collectives: over the pipeline
        one broadcast of the final hidden and of each stage's captured layers; a gather of both over
        TP under sequence parallelism."""
        if forward.message is not None:
            forward.message.wait()
        output, asked = forward.output, forward.rows
        final = self.rows.whole(self.exchange.broadcast_last(output), asked)
        if not self.captured:
            return final, final
        shape = (output.shape[0], output.shape[1])
        aux_hidden = self.exchange.broadcast_aux(forward.aux_hidden, shape)
        return torch.cat([self.rows.whole(x, asked) for x in aux_hidden], dim=-1), final

    def _run_stage(self, tokens: Tensor, positions: Tensor, cache: KeyValueCache) -> Tensor:
        """This stage's layers: this rank's rows of [n, B, H]."""
        angles = self.rotary(positions, cache.capacity)
        hidden = None
        shape = (tokens.shape[1] // self.rows.parts, tokens.shape[0])
        message = self.exchange.receive_hidden(shape)
        if message is None:
            hidden = self.gpt.embedding(input_ids=tokens, position_ids=positions)
        else:
            self.gpt.decoder.set_input_tensor(message.wait())
        mla = self.gpt.config.multi_latent_attention
        with self.gpt.mla_rotary.at(angles) if mla else nullcontext():
            return self.gpt.decoder(
                hidden_states=hidden,
                attention_mask=cache,
                rotary_pos_emb=None if mla else angles,
            )

    def argmax(self, hidden: Tensor) -> Tensor:
        """Greedy ids [...] after final hidden [..., H]; one all-gather over TP, one broadcast over
        the pipeline."""
        return self.exchange.broadcast_last(
            vocab_argmax(hidden, self._head, self._ids, self.tp_group)
        )

    def logits_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The logits of ``tokens`` [N] after one final hidden [H]; one all-reduce over TP."""
        mine = (tokens.unsqueeze(1) == self._ids).to(hidden.dtype)
        logits = mine @ (self._head @ hidden)
        if self.tp_group.size() > 1:
            torch.distributed.all_reduce(logits, group=self.tp_group)
        return logits
