"""Micro-batches of one iteration, read when their shape or content is first needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_eagle.objective.block_batch import AnyBatch
from megatron_eagle.pipeline.read_ahead import peek


class MicroBatches:
    """Reads the micro-batches of one iteration in order, and holds them until they are dropped.

    Args:
        read: makes the micro-batch of the next sample of an iterator, on the host.
        samples: the iteration's first samples, if they were taken or peeked at already.
    """

    def __init__(
        self, read: Callable[[Iterator[Any]], AnyBatch], samples: Sequence[Any] = ()
    ) -> None:
        self.read, self.samples = read, list(samples)
        self.iterator: Iterator[Any] = iter(())
        self._count = 0
        self._held: dict[int, AnyBatch] = {}

    def get(self, micro_batch: int) -> AnyBatch:
        """Return a micro-batch that was not dropped, reading it and those before it if need be."""
        while self._count <= micro_batch:
            self._take_samples(self._count + 1)
            sample = self.samples[self._count]
            self._held[self._count] = self.read(iter((sample,)))
            self._count += 1
        return self._held[micro_batch]

    def move(self, micro_batch: int, device: Any) -> AnyBatch:
        """Move a micro-batch to ``device``, where it is held from now on, and return it."""
        self._held[micro_batch] = self.get(micro_batch).to(device)
        return self._held[micro_batch]

    def drop(self, micro_batch: int) -> AnyBatch:
        """Return a micro-batch, and hold it no longer."""
        return self._held.pop(micro_batch)

    def peek_behind(self, count: int, samples: int) -> list[Any]:
        """Return the first ``samples`` samples of the next iteration, which stay to be taken;
        this one has ``count`` micro-batches."""
        self._take_samples(count)
        return peek(self.iterator, samples)

    def _take_samples(self, count: int) -> None:
        while len(self.samples) < count:
            self.samples.append(next(self.iterator))
