"""The base's hidden states of documents, brought to one rank, however the base is cut.

Documents are laid end to end into sequences, so that short ones cost no padding. Pipeline stages
take them up one behind the other and send their captured layers to the last, which puts together
what context-parallel ranks hold; its first rank has the rows. Tensor-parallel ranks all have them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.attention.packing import Packing
from megatron_eagle.parallel.context import gather_sequence
from megatron_eagle.pipeline.links import Message, StageLinks
from megatron_eagle.teacher.base import FrozenBase

SENT_AHEAD = 2
"""Sequences whose hidden states may be under way to later stages before this one waits."""


@dataclass(frozen=True)
class SequenceRows:
    """Captured layers [S, A * H] and final hidden [S, H] of documents laid end to end, which begin
    at ``starts``."""

    captured: Tensor
    final: Tensor
    starts: list[int]


class BaseRows:
    """Runs ``base``, or this pipeline stage of it, over sequences of documents. ``links`` lead to
    the other stages, if there are any. A collective of the stages."""

    def __init__(self, base: FrozenBase, links: StageLinks | None) -> None:
        self.base, self.links = base, links
        self.cp_group = base.cp_group
        self._multiple = 2 * self.cp_group.size() if self.cp_group.size() > 1 else 1
        here = base.capture.layers_here
        self._layers_by_stage: list[Any] = [here]
        if links is not None:
            self._layers_by_stage = [None] * links.stages
            torch.distributed.all_gather_object(self._layers_by_stage, here, group=links.group)

    @property
    def has_rows(self) -> bool:
        """Whether this rank gets what :meth:`run` computes."""
        last = self.links is None or self.links.is_last
        return last and self.base.tp_group.rank() == 0 and self.cp_group.rank() == 0

    @torch.no_grad()
    def run(self, sequences: Iterable[Sequence[np.ndarray]]) -> Iterator[SequenceRows | None]:
        """The rows of every sequence, in order, on the last stage; None on the others.

        Per sequence: the base's own communication, one message to the next stage and one to the
        last, and on the last one two all-gathers over context parallelism. All ranks of tensor,
        context, pipeline and expert parallelism must consume as many.
        """
        under_way: deque[list[Message]] = deque()
        for documents in sequences:
            ids, packing, starts = self._laid_end_to_end(documents)
            aux_hidden, out = self.base.run_stage(ids, self._from_stage_before(ids), packing)
            if self.links is None or self.links.is_last:
                yield self._rows(ids, aux_hidden, out, starts)
                continue
            if len(under_way) == SENT_AHEAD:
                _wait(under_way.popleft())
            under_way.append([self.links.send_hidden(out), *self._send(aux_hidden)])
            yield None
        for messages in under_way:
            _wait(messages)

    def _laid_end_to_end(
        self, documents: Sequence[np.ndarray]
    ) -> tuple[Tensor, Packing | None, list[int]]:
        """ids [1, S], who attends to whom, and where each document begins; padding is a document
        of its own at the end."""
        lengths = [len(document) for document in documents]
        padding = -sum(lengths) % self._multiple
        ids = np.concatenate([*documents, np.zeros(padding, dtype=np.int64)])
        positions = torch.cat([torch.arange(n) for n in (*lengths, padding)]).unsqueeze(0)
        device = self.base.embedding_weight.device
        packing = None
        if len(documents) > 1 or padding:
            packing = Packing.of(positions).to(positions.to(device))
        starts = np.cumsum([0, *lengths])[:-1].tolist()
        return torch.from_numpy(ids).unsqueeze(0).to(device), packing, starts

    def _from_stage_before(self, ids: Tensor) -> Tensor | None:
        if self.links is None or self.links.is_first:
            return None
        return self.links.receive_hidden(self._buffer(ids, 1)).wait()

    def _send(self, aux_hidden: dict[int, Tensor]) -> list[Message]:
        if not aux_hidden:
            return []
        assert self.links is not None
        joined = torch.cat([aux_hidden[layer] for layer in sorted(aux_hidden)], dim=-1)
        return [self.links.send_aux(joined, self.links.stages - 1)]

    def _rows(
        self, ids: Tensor, aux_hidden: dict[int, Tensor], out: Tensor, starts: list[int]
    ) -> SequenceRows:
        parts = []
        for stage, layers in enumerate(self._layers_by_stage):
            if self.links is None or stage == self.links.stage:
                parts += [aux_hidden[layer] for layer in layers]
            elif layers:
                buffer = self._buffer(ids, len(layers))
                parts.append(self.links.receive_aux(buffer, stage).wait())
        captured, final = (
            gather_sequence(hidden[:, 0], self.cp_group)
            for hidden in (torch.cat(parts, dim=-1), out)
        )
        return SequenceRows(captured, final, starts)

    def _buffer(self, ids: Tensor, blocks: int) -> Tensor:
        """An uninitialised [S', 1, blocks * H] for what another stage sends."""
        width = blocks * self.base.config.hidden_size
        return self.base.embedding_weight.new_empty(self.base.rows(ids), 1, width)


def _wait(messages: Iterable[Message]) -> None:
    for message in messages:
        message.wait()
