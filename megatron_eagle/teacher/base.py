"""The frozen base, which is the target (verifier) model of speculative decoding, and what a step
keeps of it: aux hidden states, the residual stream after chosen layers, and the final hidden.

Shapes: B batch, S sequence, S' this rank's part of it (cut over CP in Megatron's zigzag order, and
over TP under sequence parallelism), H hidden size, Vp this rank's rows of the vocabulary, A aux
layers, d rotated channels of an attention head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.attention.mla import position_rotary
from megatron_eagle.attention.packing import DocumentAttention, Packing
from megatron_eagle.checkpoint.hybrid_pattern import layer_ends
from megatron_eagle.compat import MegatronModule, gather_from_sequence_parallel_region
from megatron_eagle.parallel.context import ContextShard, append_halo
from megatron_eagle.platform.profiling import nvtx_range
from megatron_eagle.teacher.layer_sizes import StageForward, random_tokens, typical_rms
from megatron_eagle.teacher.vocab_shards import VocabShards


@dataclass(frozen=True)
class BaseOutputs:
    """Inputs of draft and teacher from the base for one micro-batch.

    features [S', B, A * H]: the aux hidden states side by side; without aux layers (EAGLE-1) the
    final hidden. final_hidden [S', B, H]: the base's output, after its final norm.
    """

    features: Tensor
    final_hidden: Tensor

    @classmethod
    def of(cls, aux_hidden: Sequence[Tensor], final_hidden: Tensor) -> BaseOutputs:
        """Concatenate the aux hidden states [S', B, H], given by ascending layer."""
        features = torch.cat(list(aux_hidden), dim=-1) if aux_hidden else final_hidden
        return cls(features, final_hidden)


class AuxCapture:
    """Hooks that keep the outputs of the aux ``layers`` (0-based ids, global over pipeline stages).

    A TransformerLayer's output is the residual stream after the layer, before any final norm:
    [S', B, H]. Layers that another pipeline stage holds are captured there. A layer of a
    HybridModel may be several of Megatron's: ``ends`` has for each layer the 0-based number of the
    last of them; None if layers count as Megatron's.

    Attributes:
        layers: ids of all aux layers.
        local_layers: ids of those that this pipeline stage holds.
        enabled: whether the hooks keep anything.
        handles: of the hooks, to remove them.
    """

    def __init__(
        self, decoder: Any, layers: Sequence[int], ends: Sequence[int] | None = None
    ) -> None:
        self._captured: dict[int, Tensor] = {}
        self.enabled = True
        self.layers = tuple(layers)
        held = {layer.layer_number - 1: layer for layer in decoder.layers}
        numbers = {i: i if ends is None else ends[i] for i in self.layers}
        self.local_layers = tuple(i for i in self.layers if numbers[i] in held)
        self.handles = [
            held[numbers[i]].register_forward_hook(self._hook(i)) for i in self.local_layers
        ]

    def _hook(self, index: int) -> Callable[[Any, Any, Any], None]:
        def capture(_module: Any, _inputs: Any, output: Any) -> None:
            if self.enabled:
                hidden = output[0] if isinstance(output, tuple) else output
                self._captured[index] = hidden.detach()

        return capture

    def take(self) -> dict[int, Tensor]:
        """Return the last forward's aux hidden states of the local layers by layer id, [S', B, H]
        each, and forget them."""
        captured, self._captured = self._captured, {}
        missing = [i for i in self.local_layers if i not in captured]
        assert not missing, f"layers {missing} were not run"
        return captured


class FrozenBase(MegatronModule):
    """Frozen target model: always in eval mode, no gradients; returns hidden states, not logits.

    Its parameters never require a gradient, so they enter neither DDP buffers nor the optimizer.
    Eval mode, which ``train`` refuses to leave, also keeps buffers (router biases, FP8 amax)
    as they are.

    Args:
        gpt: Megatron's GPTModel or HybridModel, or this pipeline stage's layers of it.
        aux_layers: ids of the layers whose outputs are captured, ascending.
        vocab_size: of the base, without padding.
        shards: this rank's rows of embedding and output layer.
    """

    def __init__(
        self,
        gpt: Any,
        aux_layers: Sequence[int],
        vocab_size: int,
        shards: VocabShards | None = None,
    ) -> None:
        super().__init__(config=gpt.config)
        self.gpt = gpt.requires_grad_(False).eval()
        self.shards = shards or VocabShards(gpt)
        self.vocab_size = vocab_size
        pattern = getattr(gpt, "hybrid_layer_pattern", None)
        ends = None if pattern is None else layer_ends(pattern)
        self.capture = AuxCapture(gpt.decoder, aux_layers, ends)
        self.tp_group, self.cp_group = gpt.pg_collection.tp, gpt.pg_collection.cp
        self._angles: Tensor | None = None
        # GPTModel counts positions from the sequence's start, packed documents from their own.
        if (rotary := position_rotary(gpt)) is not None:
            rotary.register_forward_hook(
                lambda _module, _inputs, angles: angles if self._angles is None else self._angles
            )
        # Without post-processing, GPTModel returns the decoder's output instead of logits; the
        # decoder's own final norm is not affected.
        gpt.post_process = False

    @property
    def embedding_weight(self) -> Tensor:
        """Word embedding [Vp, H]."""
        return self.shards.embedding_weight

    @property
    def output_weight(self) -> Tensor:
        """Weight of the output layer [Vp, H] (the embedding's, when tied)."""
        return self.shards.output_weight

    def train(self, mode: bool = True) -> FrozenBase:
        """Stay in eval mode, whatever ``mode`` is."""
        return super().train(False)

    def forward(self, tokens: Tensor, packing: Packing | None = None) -> BaseOutputs:
        """Run a base that is whole on this rank on sequences of tokens [B, S], packed or not."""
        aux_hidden, final = self.run_stage(tokens, None, packing)
        return BaseOutputs.of([aux_hidden[i] for i in self.capture.layers], final)

    @torch.no_grad()
    def run_stage(
        self, tokens: Tensor, hidden: Tensor | None, packing: Packing | None = None
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Run this pipeline stage's layers.

        Args:
            tokens: whole sequences [B, S]; only the first stage embeds them.
            hidden: the previous stage's output [S', B, H]; None on the first stage.
            packing: the documents in the sequences, if they are packed.

        Returns:
            The aux hidden states by layer id and the stage's output, [S', B, H] each; the last
            stage's output is the final hidden, after the final norm.
        """
        shard = ContextShard.of(tokens.shape[1], self.cp_group)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if packing is not None:  # learned positions restart with every document, too
            positions = packing.positions
        self.gpt.set_input_tensor(hidden)
        with nvtx_range("base"), self._inside_documents(packing) as attention:
            out = self.gpt(
                shard.take(tokens, 1), shard.take(positions, 1), attention_mask=attention
            )
        return self.capture.take(), out

    def local_shape(self, tokens: Tensor) -> tuple[int, int]:
        """Return (S', B) of whole sequences of tokens [B, S]."""
        batch, length = tokens.shape
        parts = self.tp_group.size() if self.config.sequence_parallel else 1
        return length // (self.cp_group.size() * parts), batch

    @contextmanager
    def _inside_documents(self, packing: Packing | None) -> Iterator[DocumentAttention | None]:
        """Yield what to give the layers as attention mask; inside, RoPE angles restart at every
        document."""
        if packing is None:
            yield None
            return
        if self.has_rotary:
            rotary = self.rotary(packing.positions.shape[1])
            self._angles = packing.angles(rotary, self.cp_group)
        try:
            yield DocumentAttention(packing, self.cp_group)
        finally:
            self._angles = None

    def gather_final(self, final: Tensor, halo: int) -> Tensor:
        """Gather the final hidden [S', B, H], see :func:`gather_final`."""
        parallel = self.tp_group if self.config.sequence_parallel else None
        return gather_final(final, halo, parallel, self.cp_group)

    @property
    def has_rotary(self) -> bool:
        """Return whether the base has RoPE, not learned positions or none."""
        return position_rotary(self.gpt) is not None

    @torch.no_grad()
    def rotary(self, length: int) -> Tensor:
        """Return the RoPE angles of positions 0 .. length - 1, [length, 1, 1, d]; of a base that
        has RoPE."""
        # packed_seq: not cut over CP.
        return position_rotary(self.gpt)(length, packed_seq=True)

    @torch.no_grad()
    def layer_sizes(self, stages: StageForward, length: int = 128) -> Tensor:
        """Measure the typical RMS of each aux layer's output: [A] fp32, the same on every rank.

        Measured on random tokens, see :func:`~megatron_eagle.teacher.layer_sizes.typical_rms`.
        Collectives besides the base's own: one all-gather per aux layer over each group that cuts
        the sequence, and one all-reduce over the pipeline ``stages``.
        """
        multiple = 2 * self.cp_group.size() * self.tp_group.size()
        if self.gpt.position_embedding_type == "learned_absolute":
            length = min(length, self.gpt.max_sequence_length // multiple * multiple)
        device = self.embedding_weight.device
        tokens = random_tokens(self.vocab_size, length, multiple).to(device)
        groups = [self.cp_group, *([self.tp_group] if self.config.sequence_parallel else [])]
        measured = typical_rms(stages.local_aux_hidden(tokens), self.capture.layers, groups)
        sizes = torch.zeros(len(self.capture.layers), device=device)
        for layer, size in measured.items():
            sizes[self.capture.layers.index(layer)] = size
        stages.sum_over_stages(sizes)
        return sizes


@torch.no_grad()
def gather_final(
    final: Tensor, halo: int, sequence_group: ProcessGroup | None, cp_group: ProcessGroup
) -> Tensor:
    """Gather the final hidden [S', B, H] to the rows by which ``EagleBatch`` counts its targets:
    whole over TP, and each context-parallel piece with ``halo`` more positions.

    ``sequence_group``: the TP group under sequence parallelism, which cuts the tokens. One
    all-gather over it, and a small one over ``cp_group``. Not differentiable.
    """
    if sequence_group is not None:
        final = gather_from_sequence_parallel_region(final, group=sequence_group)
    return append_halo(final, halo, cp_group)
