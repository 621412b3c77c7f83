"""AuxCapture to their owner: what the base's stages know of a micro-batch, brought to one of them.

A stage sends its captured layers side by side, the last stage the final hidden behind them, as one
message: with ``CUDA_DEVICE_MAX_CONNECTIONS=1`` a second receive from the same rank, which waits for
the first, can keep the device from work that comes after it and that the sender may wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.pipeline.links import Message, StageLinks
from megatron_eagle.pipeline.plan import owner_of
from megatron_eagle.teacher.outputs import BaseOutputs

_Parts = dict[int, Message | Tensor]
"""One owned micro-batch: of each stage that knows something of it a posted receive, or a tensor of
this stage's own."""


class AuxRouter:
    """Sends this stage's captured layers to the owners; collects those of its own micro-batches.

    Bounded memory: a stage holds the captured layers of the micro-batch it trains on and of the
    next one it owns (``expect`` is called one ahead), and what it sends stays alive until it has
    left. If the owner has not received this stage's previous message yet, ``deliver`` blocks.

    Args:
        links: this stage's links.
        captured: the captured layers, ascending.
        layers_by_stage: per stage, those it holds.
        new_buffer: makes an uninitialised [S', B, width] for a micro-batch.
        leaving: what is on its way to each owner already, from the iteration before.
    """

    def __init__(
        self,
        links: StageLinks,
        captured: Sequence[int],
        layers_by_stage: Sequence[Sequence[int]],
        hidden_size: int,
        new_buffer: Callable[[int, int], Tensor],
        leaving: dict[int, Message],
    ) -> None:
        self.links, self.captured = links, tuple(captured)
        self.layers_by_stage, self.hidden_size = layers_by_stage, hidden_size
        self.new_buffer = new_buffer
        self._owned: dict[int, _Parts] = {}
        self.leaving = leaving

    @property
    def held(self) -> int:
        """Owned micro-batches whose aux_hidden are here or expected."""
        return len(self._owned)

    def expect(self, micro_batch: int, senders: range) -> None:
        """Post the receives of a micro-batch that this stage owns from the stages ``senders``."""
        parts = self._parts(micro_batch)
        for stage in senders:
            width = self._hiddens(stage) * self.hidden_size
            if stage != self.links.stage and width:
                buffer = self.new_buffer(micro_batch, width)
                parts[stage] = self.links.receive_aux(buffer, stage)

    def _hiddens(self, stage: int) -> int:
        """How many hidden states ``stage`` knows of each micro-batch."""
        return len(self.layers_by_stage[stage]) + (stage == self.links.stages - 1)

    def deliver(self, micro_batch: int, aux_hidden: dict[int, Tensor], output: Tensor) -> None:
        """Hand on what this stage's base made of ``micro_batch``: its captured layers, and on the
        last stage the final hidden."""
        owner = owner_of(micro_batch, self.links.stages)
        known = [aux_hidden[i] for i in sorted(aux_hidden)]
        if self.links.is_last:
            known.append(output)
        if not known:
            return
        tensor = torch.cat(known, dim=-1)
        if owner == self.links.stage:
            self._parts(micro_batch)[owner] = tensor
            return
        if owner in self.leaving:
            self.leaving[owner].wait()
        self.leaving[owner] = self.links.send_aux(tensor, owner)

    def _parts(self, micro_batch: int) -> _Parts:
        parts = self._owned.setdefault(micro_batch, {})
        assert self.held <= 2, "the one that is trained on, and the next"
        return parts

    def collect(self, micro_batch: int) -> BaseOutputs:
        """The whole of an owned micro-batch, which is then forgotten; waits for what is missing."""
        parts = self._owned.pop(micro_batch)
        known = {
            stage: _arrived(part).chunk(self._hiddens(stage), dim=-1)
            for stage, part in parts.items()
        }
        by_layer: dict[int, Tensor] = {}
        for stage, hiddens in known.items():
            by_layer |= zip(self.layers_by_stage[stage], hiddens, strict=False)
        final = known[self.links.stages - 1][-1].contiguous()  # without the layers beside it
        return BaseOutputs.of([by_layer[i] for i in self.captured], final)

    def finish(self) -> None:
        """Until everything that was posted has left or arrived, which is then forgotten."""
        for message in self.leaving.values():
            message.wait()
        for parts in self._owned.values():
            for part in parts.values():
                _arrived(part)
        self.leaving.clear()
        self._owned.clear()


def _arrived(part: Any) -> Tensor:
    return part.wait() if isinstance(part, Message) else part
