"""The frozen base: a GPTModel that only looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.packing import DocumentAttention, Packing
from megatron_eagle.compat import MegatronModule, gather_from_sequence_parallel_region
from megatron_eagle.parallel.context import ContextShard, append_halo
from megatron_eagle.platform.nvtx import nvtx_range
from megatron_eagle.teacher.taps import Taps


def output_rows(gpt: Any) -> Tensor:
    """[Vp, H]: this rank's rows of a GPTModel's output layer (the embedding's, when tied)."""
    if gpt.share_embeddings_and_output_weights:
        return gpt.embedding.word_embeddings.weight
    return gpt.output_layer.weight


class FrozenBase(MegatronModule):
    """A GPTModel that only looks: always in eval mode, no gradients, hidden states for logits.

    Its parameters never require a gradient, so they enter neither DDP buffers nor the optimizer;
    eval mode, which :meth:`train` refuses to leave, also keeps buffers (router biases, FP8 amax)
    as they are.
    """

    def __init__(self, gpt: Any, captured: Sequence[int], vocab_size: int) -> None:
        super().__init__(config=gpt.config)
        self.gpt = gpt.requires_grad_(False).eval()
        self.vocab_size = vocab_size
        self.taps = Taps(gpt.decoder, captured)
        self.tp_group, self.cp_group = gpt.pg_collection.tp, gpt.pg_collection.cp
        self._angles: Tensor | None = None
        # GPTModel counts positions from the sequence's start; packed documents have their own.
        if not gpt.config.multi_latent_attention:  # which has its own inside its layers
            gpt.rotary_pos_emb.register_forward_hook(
                lambda _module, _inputs, angles: angles if self._angles is None else self._angles
            )
        # GPTModel returns the decoder's output when it is not to post-process it; the decoder's
        # own final norm is not affected.
        gpt.post_process = False

    @property
    def embedding_weight(self) -> Tensor:
        """[Vp, H]: this rank's rows of the word embedding."""
        return self.gpt.embedding.word_embeddings.weight

    @property
    def output_weight(self) -> Tensor:
        """[Vp, H]: this rank's rows of the output layer."""
        return output_rows(self.gpt)

    def train(self, mode: bool = True) -> FrozenBase:
        return super().train(False)

    @torch.no_grad()
    def forward(self, tokens: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
        """tokens [B, S], packed of documents or not -> what the draft reads and the final hidden
        [S', B, H] (after the final norm). S' are this rank's rows: S, cut over CP in Megatron's
        zigzag order, and over TP under sequence parallelism. The draft reads the captured layers
        [S', B, A * H], or if none are, the final hidden (EAGLE-1)."""
        shard = ContextShard.of(tokens.shape[1], self.cp_group)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        with nvtx_range("base"), self._inside_documents(packing) as attention:
            final = self.gpt(
                shard.take(tokens, 1), shard.take(positions, 1), attention_mask=attention
            )
        return self.taps.take() if self.taps.layers else final, final

    @contextmanager
    def _inside_documents(self, packing: Packing | None) -> Iterator[DocumentAttention | None]:
        """What the base's layers attend by; inside, its RoPE angles restart at every document."""
        if packing is None:
            yield None
            return
        rotary = self.rotary(packing.positions.shape[1])
        self._angles = packing.angles(rotary, self.cp_group)
        try:
            yield DocumentAttention(packing, self.cp_group)
        finally:
            self._angles = None

    @torch.no_grad()
    def gather_final(self, final: Tensor, halo: int) -> Tensor:
        """Final hidden [S', B, H] as :class:`~megatron_eagle.objective.batch.EagleBatch` counts its
        target rows: whole over TP, the context-parallel pieces with ``halo`` rows more. One
        all-gather over TP under sequence parallelism, and a small one over CP."""
        if self.config.sequence_parallel:
            final = gather_from_sequence_parallel_region(final, group=self.tp_group)
        return append_halo(final, halo, self.cp_group)

    @torch.no_grad()
    def rotary(self, length: int) -> Tensor:
        """RoPE angles of positions 0 .. length - 1, [length, 1, 1, d]."""
        # packed_seq: not cut over CP.
        return self.gpt.rotary_pos_emb(length, packed_seq=True)

    @torch.no_grad()
    def layer_sizes(self, length: int = 128) -> Tensor:
        """[A] fp32: the typical RMS of each captured layer, the same on every TP and CP rank.

        Measured on random tokens, which need no data; medians over tokens, since first tokens carry
        massive activations. One all-reduce over each group that cuts the sequence, beside the
        base's own.
        """
        multiple = 2 * self.cp_group.size() * self.tp_group.size()
        length = -(-length // multiple) * multiple
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocab_size, (1, length), generator=generator)
        features, _ = self(tokens.to(self.embedding_weight.device))
        blocks = features.float().unflatten(-1, (len(self.taps.layers), -1))
        sizes = blocks.square().mean(-1).sqrt().flatten(0, 1).median(0).values
        groups = [self.cp_group, *([self.tp_group] if self.config.sequence_parallel else [])]
        for group in groups:
            if group.size() > 1:
                torch.distributed.all_reduce(sizes, group=group)
                sizes /= group.size()
        return sizes
