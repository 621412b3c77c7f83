"""The frozen base: a GPTModel that only looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_eagle.attention.mla import position_rotary
from megatron_eagle.attention.packing import DocumentAttention, Packing
from megatron_eagle.compat import MegatronModule, gather_from_sequence_parallel_region
from megatron_eagle.parallel.context import ContextShard, append_halo
from megatron_eagle.platform.profiling import nvtx_range
from megatron_eagle.teacher.aux_capture import AuxCapture
from megatron_eagle.teacher.outputs import BaseOutputs
from megatron_eagle.teacher.vocab_shards import VocabShards


class FrozenBase(MegatronModule):
    """A GPTModel that only looks: always in eval mode, no gradients, hidden states for logits.

    Its parameters never require a gradient, so they enter neither DDP buffers nor the optimizer;
    eval mode, which :meth:`train` refuses to leave, also keeps buffers (router biases, FP8 amax)
    as they are.
    """

    def __init__(
        self, gpt: Any, captured: Sequence[int], vocab_size: int, shards: VocabShards | None = None
    ) -> None:
        super().__init__(config=gpt.config)
        self.gpt = gpt.requires_grad_(False).eval()
        self.shards = shards or VocabShards(gpt)
        self.vocab_size = vocab_size
        self.capture = AuxCapture(gpt.decoder, captured)
        self.tp_group, self.cp_group = gpt.pg_collection.tp, gpt.pg_collection.cp
        self._angles: Tensor | None = None
        # GPTModel counts positions from the sequence's start; packed documents have their own.
        position_rotary(gpt).register_forward_hook(
            lambda _module, _inputs, angles: angles if self._angles is None else self._angles
        )
        # GPTModel returns the decoder's output when it is not to post-process it; the decoder's
        # own final norm is not affected.
        gpt.post_process = False

    @property
    def embedding_weight(self) -> Tensor:
        """[Vp, H]: this rank's rows of the word embedding."""
        return self.shards.embedding_weight

    @property
    def output_weight(self) -> Tensor:
        """[Vp, H]: this rank's rows of the output layer (the embedding's, when tied)."""
        return self.shards.output_weight

    def train(self, mode: bool = True) -> FrozenBase:
        return super().train(False)

    def forward(self, tokens: Tensor, packing: Packing | None = None) -> BaseOutputs:
        """The base's outputs for whole sequences of tokens [B, S], packed of documents or not, all
        layers being here. S' are this rank's rows: S, cut over CP in Megatron's zigzag order, and
        over TP under sequence parallelism."""
        aux_hidden, final = self.run_stage(tokens, None, packing)
        return BaseOutputs.of([aux_hidden[i] for i in self.capture.layers], final)

    @torch.no_grad()
    def run_stage(
        self, tokens: Tensor, hidden: Tensor | None, packing: Packing | None = None
    ) -> tuple[dict[int, Tensor], Tensor]:
        """This pipeline stage's layers: tokens [B, S], read by the first stage only, and ``hidden``
        [S', B, H] of the stage before -> captured layers by id and the output, [S', B, H] each
        (on the last stage after the final norm)."""
        shard = ContextShard.of(tokens.shape[1], self.cp_group)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        self.gpt.set_input_tensor(hidden)
        with nvtx_range("base"), self._inside_documents(packing) as attention:
            out = self.gpt(
                shard.take(tokens, 1), shard.take(positions, 1), attention_mask=attention
            )
        return self.capture.take(), out

    def rows(self, tokens: Tensor) -> int:
        """S' of whole sequences of tokens [B, S]."""
        parts = self.tp_group.size() if self.config.sequence_parallel else 1
        return tokens.shape[1] // (self.cp_group.size() * parts)

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
        return position_rotary(self.gpt)(length, packed_seq=True)

    @torch.no_grad()
    def layer_sizes(self, stages: StageForward | None = None, length: int = 128) -> Tensor:
        """Measure the typical RMS of each captured layer: [A] fp32, the same on every rank.

        Measured on random tokens, which need no data; medians over tokens, since first tokens carry
        massive activations. One all-gather per captured layer over each group that cuts the
        sequence, so that no layout changes the medians, and one all-reduce over pipeline stages,
        whose layers ``stages`` runs; beside the base's own communication.
        """
        multiple = 2 * self.cp_group.size() * self.tp_group.size()
        length = -(-length // multiple) * multiple
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocab_size, (1, length), generator=generator)
        tokens = tokens.to(self.embedding_weight.device)
        aux_hidden = self.run_stage(tokens, None)[0] if stages is None else stages.run(tokens)
        sizes = torch.zeros(len(self.capture.layers), device=self.embedding_weight.device)
        groups = [self.cp_group, *([self.tp_group] if self.config.sequence_parallel else [])]
        for layer, hidden in aux_hidden.items():
            rms = hidden.float().square().mean(-1).sqrt().flatten()
            for group in groups:
                rms = _all_ranks(rms, group)
            sizes[self.capture.layers.index(layer)] = rms.median()
        if stages is not None:
            torch.distributed.all_reduce(sizes, group=stages.group)
        return sizes


class StageForward(Protocol):
    """One forward through all pipeline stages:
    :class:`~megatron_eagle.pipeline.exchange.ForwardPass`."""

    group: Any

    def run(self, tokens: Tensor) -> dict[int, Tensor]:
        """This stage's captured layers, by id, of tokens [B, S]."""
        ...


def _all_ranks(values: Tensor, group: Any) -> Tensor:
    """[n] of every rank of ``group`` as [ranks * n]."""
    if group.size() == 1:
        return values
    received = values.new_empty(group.size() * values.numel())
    torch.distributed.all_gather_into_tensor(received, values.contiguous(), group=group)
    return received
