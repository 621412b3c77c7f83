"""Exchange of hidden states between pipeline stages, for training, decoding and feature extraction.

Shapes: B batch, S sequence, S' this rank's part of it (cut over CP, and over TP under sequence
parallelism; in decoding n tokens instead, cut over TP alone), H hidden size, A aux layers of all
stages. A ``Shape`` is (S', B): every hidden state is [S', B, H].
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.attention.packing import Packing
from megatron_eagle.pipeline.links import Message, StageLinks
from megatron_eagle.teacher.base import BaseOutputs, FrozenBase

Shape = tuple[int, int]
Part = Message | list[Tensor]
"""Hidden states of one stage for a micro-batch: under way, or computed by this stage itself."""


class StageExchange:
    """Sends and receives the hidden states of one base on its pipeline stages.

    Without ``links`` the base is whole on this rank and nothing is sent. Constructing it is a
    collective of the stages, which tell each other which aux layers they hold.

    Attributes:
        stage, stages: this stage's number, and how many there are.
        layers_by_stage: per stage, the ids of the aux layers that it holds, ascending.
    """

    def __init__(self, base: FrozenBase, links: StageLinks | None = None) -> None:
        self.base, self.links = base, links
        self.stage, self.stages = (0, 1) if links is None else (links.stage, links.stages)
        local_layers = base.capture.local_layers
        self.layers_by_stage: list[Any] = [local_layers]
        if links is not None:
            self.layers_by_stage = [None] * links.stages
            torch.distributed.all_gather_object(
                self.layers_by_stage, local_layers, group=links.group
            )

    @classmethod
    def of(
        cls, base: FrozenBase, group: ProcessGroup, timeout: timedelta | None = None
    ) -> StageExchange:
        """Link the stages of the pipeline ``group``, if there are several. Collective: every rank
        of the world must call it."""
        return cls(base, StageLinks(group, timeout) if group.size() > 1 else None)

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def buffer(self, shape: Shape, count: int) -> Tensor:
        """Return an uninitialised [S', B, ``count`` * H] of the hidden states' dtype."""
        config, weight = self.base.config, self.base.embedding_weight
        dtype = torch.float32 if config.fp32_residual_connection else weight.dtype
        width = count * config.hidden_size
        return torch.empty(*shape, width, dtype=dtype, device=weight.device)

    # From stage to stage.

    def receive_hidden(self, shape: Shape) -> Message | None:
        """Post the receive of the previous stage's output; None on the first stage."""
        if self.links is None or self.is_first:
            return None
        return self.links.receive_hidden(self.buffer(shape, 1))

    def send_hidden(self, output: Tensor) -> Message | None:
        """Post the send of this stage's output to the next stage; None on the last stage."""
        if self.links is None or self.is_last:
            return None
        return self.links.send_hidden(output)

    def run_stage(
        self, tokens: Tensor, packing: Packing | None = None
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Receive the previous stage's output for whole sequences of tokens [B, S], and run this
        stage's layers on it. Returns the aux hidden states by layer id, and the output."""
        message = self.receive_hidden(self.base.local_shape(tokens))
        hidden = None if message is None else message.wait()
        return self.base.run_stage(tokens, hidden, packing)

    def local_aux_hidden(self, tokens: Tensor) -> dict[int, Tensor]:
        """Run one forward through all stages, and return this stage's aux hidden states by layer
        id. One message a link."""
        aux_hidden, output = self.run_stage(tokens)
        message = self.send_hidden(output)
        if message is not None:
            message.wait()
        return aux_hidden

    def sum_over_stages(self, values: Tensor) -> None:
        """Sum ``values`` over the stages, in place. One all-reduce."""
        if self.links is not None:
            torch.distributed.all_reduce(values, group=self.links.group)

    # To one stage: a micro-batch's owner in training, the last stage in feature extraction.

    def outputs_of(self, stage: int) -> int:
        """Return how many hidden states a reader needs from ``stage``: those of its aux layers, and
        from the last stage the final hidden."""
        return len(self.layers_by_stage[stage]) + (stage == self.stages - 1)

    def local_outputs(self, aux_hidden: dict[int, Tensor], output: Tensor) -> list[Tensor]:
        """Return the hidden states that a reader needs from this stage, the final one last."""
        outputs = [aux_hidden[layer] for layer in sorted(aux_hidden)]
        return [*outputs, output] if self.is_last else outputs

    def send_outputs(self, outputs: list[Tensor], reader: int) -> Message | None:
        """Post the send of this stage's ``local_outputs`` to the stage ``reader``; None without
        any.

        They travel side by side as one message: with ``CUDA_DEVICE_MAX_CONNECTIONS=1`` a second
        receive from the same rank, which waits for the first, can keep the device from later work
        that the sender may wait for.
        """
        if self.links is None or not outputs:
            return None
        return self.links.send_aux(torch.cat(outputs, dim=-1), reader)

    def receive_outputs(self, shape: Shape, stage: int) -> Message | None:
        """Post the receive of another ``stage``'s outputs; None if it has none."""
        count = self.outputs_of(stage)
        if self.links is None or not count:
            return None
        return self.links.receive_aux(self.buffer(shape, count), stage)

    def assemble(self, parts: Mapping[int, Part]) -> BaseOutputs:
        """Wait for the ``parts`` of a micro-batch, by stage, and return the base's outputs."""
        outputs = {stage: self._arrived(stage, part) for stage, part in parts.items()}
        by_layer: dict[int, Tensor] = {}
        for stage, hiddens in outputs.items():
            by_layer |= zip(self.layers_by_stage[stage], hiddens, strict=False)
        # Contiguous, so that it does not keep alive the aux hidden states it travelled with.
        final_hidden = outputs[self.stages - 1][-1].contiguous()
        return BaseOutputs.of([by_layer[i] for i in self.base.capture.layers], final_hidden)

    def _arrived(self, stage: int, part: Part) -> list[Tensor]:
        if isinstance(part, Message):
            return list(part.wait().chunk(self.outputs_of(stage), dim=-1))
        return part

    # To all stages, which in decoding hold the same tokens and draft the same from them.

    def broadcast_aux(self, aux_hidden: dict[int, Tensor], shape: Shape) -> list[Tensor]:
        """Return all A aux hidden states in order, given this stage's by layer id. One broadcast
        per stage that has some."""
        if self.links is None:
            return [aux_hidden[layer] for layer in self.base.capture.layers]
        by_layer: dict[int, Tensor] = {}
        for stage, layers in enumerate(self.layers_by_stage):
            if not layers:
                continue
            if stage == self.stage:
                joined = torch.cat([aux_hidden[layer] for layer in layers], dim=-1)
            else:
                joined = self.buffer(shape, len(layers))
            torch.distributed.broadcast(joined, group=self.links.group, group_src=stage)
            by_layer |= zip(layers, joined.chunk(len(layers), dim=-1), strict=True)
        return [by_layer[layer] for layer in self.base.capture.layers]

    def broadcast_last(self, tensor: Tensor) -> Tensor:
        """Return the last stage's ``tensor``; the other stages' has the same shape and dtype. One
        broadcast."""
        if self.links is None:
            return tensor
        tensor = tensor.contiguous() if self.is_last else tensor.new_empty(tensor.shape)
        torch.distributed.broadcast(tensor, group=self.links.group, group_src=self.stages - 1)
        return tensor
