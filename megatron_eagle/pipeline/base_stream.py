"""The base forwards of one iteration on one pipeline stage, and the messages they need.

All stages read the same micro-batches, so every shape is known before a message arrives. Shapes: S'
this rank's part of the sequence, B batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from megatron_eagle.objective.block_batch import AnyBatch
from megatron_eagle.pipeline.aux_router import AuxRouter
from megatron_eagle.pipeline.exchange import Shape, StageExchange
from megatron_eagle.pipeline.in_flight import InFlight
from megatron_eagle.pipeline.links import Message
from megatron_eagle.pipeline.micro_batches import MicroBatches
from megatron_eagle.pipeline.plan import forwards_ahead, owner_of
from megatron_eagle.teacher.base import BaseOutputs

Observer = Callable[[str, int], AbstractContextManager[Any]]
"""Called with what is about to happen (the kind of an action, or "wait" for a message) and the
number of the micro-batch; entered and left around it."""


class BaseStream:
    """Runs this stage's layers of the base on one iteration's micro-batches, in order.

    A stream made by ``next_iteration`` runs its first forwards ahead, during the iteration
    before its own; ``start`` is called when its own iteration begins.

    Args:
        read, samples: see ``MicroBatches``.
        observer: see ``Observer``.
        in_flight: messages of earlier iterations that may still be leaving.

    Attributes:
        was_ahead: whether the first forwards were run ahead.
    """

    def __init__(
        self,
        exchange: StageExchange,
        read: Callable[[Iterator[Any]], AnyBatch],
        observer: Observer,
        samples: Sequence[Any] = (),
        in_flight: InFlight | None = None,
    ) -> None:
        self.exchange, self.observer = exchange, observer
        self.batches = MicroBatches(read, samples)
        self.in_flight = in_flight or InFlight()
        self.router = AuxRouter(exchange, self.in_flight)
        self.was_ahead = False
        self._count: int | None = None
        self._incoming: Message | None = None

    def start(self, iterator: Iterator[Any], count: int) -> None:
        """Begin the stream's own iteration, of ``count`` micro-batches from ``iterator`` (the
        ``samples`` aside)."""
        self.batches.iterator, self._count = iterator, count

    def next_iteration(self) -> BaseStream:
        """Return the stream of the next iteration, of which some forwards are run ahead."""
        assert self._count is not None
        samples = self.batches.peek_behind(self._count, self.exchange.stages)
        stream = BaseStream(
            self.exchange, self.batches.read, self.observer, samples, self.in_flight
        )
        stream.was_ahead = True
        return stream

    def expect_hidden(self, micro_batch: int) -> None:
        """Post the receive of the previous stage's output for ``micro_batch``."""
        if not self.exchange.is_first:
            self._incoming = self.exchange.receive_hidden(self._shape(micro_batch))

    def expect_outputs(self, micro_batch: int) -> None:
        """Post the receives of the base's outputs for a micro-batch that this stage owns."""
        senders = range(self.exchange.stages)
        self.router.expect(micro_batch, self._shape(micro_batch), senders)

    def expect_outputs_ahead(self) -> None:
        """Post the receives for this stage's first micro-batch from the stages that send their
        outputs before the stream's own iteration begins."""
        stage, stages = self.exchange.stage, self.exchange.stages
        self.router.expect(stage, self._shape(stage), range(forwards_ahead(stage, stages)))

    def _shape(self, micro_batch: int) -> Shape:
        return self.exchange.base.local_shape(self.batches.get(micro_batch).tokens)

    def run(self, kind: str, micro_batch: int) -> None:
        """Run the next forward, and hand on what it gives; the observer sees it as ``kind``."""
        exchange, in_flight = self.exchange, self.in_flight
        batch = self.batches.move(micro_batch, exchange.base.embedding_weight.device)
        hidden = None if exchange.is_first else self._take_hidden(micro_batch)
        with self.observer(kind, micro_batch):
            aux_hidden, output = exchange.base.run_stage(batch.tokens, hidden, batch.packing)
        if not exchange.is_last:
            if in_flight.is_full:
                with self.observer("wait", micro_batch):
                    in_flight.make_room()
            in_flight.add(exchange.send_hidden(output))
        self.router.deliver(micro_batch, aux_hidden, output)
        if owner_of(micro_batch, exchange.stages) != exchange.stage:
            self.batches.drop(micro_batch)

    def _take_hidden(self, micro_batch: int) -> Tensor:
        """Wait for the previous stage's output [S', B, H], and post the next receive."""
        if self._incoming is None:
            self.expect_hidden(micro_batch)
        assert self._incoming is not None
        with self.observer("wait", micro_batch):
            hidden = self._incoming.wait()
        self._incoming = None
        if micro_batch + 1 != self._count:
            self.expect_hidden(micro_batch + 1)
        return hidden

    def collect(self, micro_batch: int) -> tuple[AnyBatch, BaseOutputs]:
        """Wait for the base's outputs for a micro-batch that this stage owns; return both, which
        are not held any longer."""
        with self.observer("wait", micro_batch):
            outputs = self.router.collect(micro_batch)
        return self.batches.drop(micro_batch), outputs

    def finish(self) -> None:
        """Wait until everything posted has arrived or left; what arrived is forgotten."""
        if self._incoming is not None:
            self._incoming.wait()
        self.in_flight.finish()
        self.router.abandon()
