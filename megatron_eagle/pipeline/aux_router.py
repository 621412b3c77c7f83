"""Routing of aux hidden states: from the stages that compute them to each micro-batch's owner."""

from __future__ import annotations

from torch import Tensor

from megatron_eagle.pipeline.exchange import Part, Shape, StageExchange
from megatron_eagle.pipeline.in_flight import InFlight
from megatron_eagle.pipeline.links import Message
from megatron_eagle.pipeline.plan import owner_of
from megatron_eagle.teacher.base import BaseOutputs


class AuxRouter:
    """Delivers this stage's outputs to their owners; collects those of the micro-batches it owns.

    Bounded memory: a stage holds the outputs of the micro-batch it trains on and of the next one it
    owns (``expect`` is called one ahead), and what it sends stays alive until it has left. If
    an owner has not received this stage's previous message yet, ``deliver`` blocks.
    """

    def __init__(self, exchange: StageExchange, in_flight: InFlight) -> None:
        self.exchange, self.in_flight = exchange, in_flight
        self._owned: dict[int, dict[int, Part]] = {}

    @property
    def held(self) -> int:
        """Number of owned micro-batches whose outputs have arrived or are expected."""
        return len(self._owned)

    def expect(self, micro_batch: int, shape: Shape, senders: range) -> None:
        """Post the receives of a micro-batch that this stage owns from the stages ``senders``, but
        for those already posted. ``shape``: (S', B), its positions on this rank and its batch."""
        parts = self._parts(micro_batch)
        for stage in senders:
            if stage == self.exchange.stage or stage in parts:
                continue
            if message := self.exchange.receive_outputs(shape, stage):
                parts[stage] = message

    def deliver(self, micro_batch: int, aux_hidden: dict[int, Tensor], output: Tensor) -> None:
        """Hand on this stage's aux hidden states by layer id, and on the last stage the final
        hidden ``output``, [S', B, H] each."""
        outputs = self.exchange.local_outputs(aux_hidden, output)
        owner = owner_of(micro_batch, self.exchange.stages)
        if not outputs:
            return
        if owner == self.exchange.stage:
            self._parts(micro_batch)[owner] = outputs
            return
        self.in_flight.wait_for_owner(owner)
        message = self.exchange.send_outputs(outputs, owner)
        assert message is not None
        self.in_flight.add_to_owner(owner, message)

    def _parts(self, micro_batch: int) -> dict[int, Part]:
        parts = self._owned.setdefault(micro_batch, {})
        assert self.held <= 2, "the one that is trained on, and the next"
        return parts

    def collect(self, micro_batch: int) -> BaseOutputs:
        """Wait for the outputs of an owned micro-batch, forget them, and return them."""
        return self.exchange.assemble(self._owned.pop(micro_batch))

    def abandon(self) -> None:
        """Wait for every posted receive, and forget what arrived."""
        for parts in self._owned.values():
            for part in parts.values():
                if isinstance(part, Message):
                    part.wait()
        self._owned.clear()
