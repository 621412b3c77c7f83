"""The base's hidden states of documents, brought to one rank in any parallel layout.

Documents are concatenated into sequences, so that short ones cost no padding. Pipeline stages run
them one after another and send their aux hidden states to the last stage, which gathers over
context parallelism; the first rank of that group has the result. Tensor-parallel ranks all have it.

Shapes: S sequence, S' this rank's part of it, H hidden size, A aux layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.attention.packing import Packing
from megatron_eagle.parallel.context import gather_sequence
from megatron_eagle.pipeline.exchange import Part, StageExchange
from megatron_eagle.pipeline.in_flight import InFlight
from megatron_eagle.teacher.base import BaseOutputs


@dataclass(frozen=True)
class SequenceRows:
    """Hidden states of concatenated documents that begin at ``starts``: the aux layers' as features
    [S, A * H], and the final hidden [S, H]."""

    features: Tensor
    final: Tensor
    starts: list[int]


class BaseRows:
    """Runs the base of ``exchange``, or this pipeline stage of it, over sequences of documents."""

    def __init__(self, exchange: StageExchange) -> None:
        self.exchange, self.base = exchange, exchange.base
        self.cp_group = self.base.cp_group
        self._multiple = 2 * self.cp_group.size() if self.cp_group.size() > 1 else 1

    @property
    def has_rows(self) -> bool:
        """Whether this rank is the one that writes what ``run`` yields."""
        return (
            self.exchange.is_last and self.base.tp_group.rank() == 0 and self.cp_group.rank() == 0
        )

    @torch.no_grad()
    def run(self, sequences: Iterable[Sequence[np.ndarray]]) -> Iterator[SequenceRows | None]:
        """Yield the hidden states of every sequence, in order, on the last stage; None on others.

        Per sequence: the base's own communication, one message to the next stage and one to the
        last, and on the last stage two all-gathers over context parallelism. All ranks of tensor,
        context, pipeline and expert parallelism must consume the same number of sequences.
        """
        exchange, in_flight = self.exchange, InFlight()
        for documents in sequences:
            ids, packing, starts = self._concatenate(documents)
            aux_hidden, output = exchange.run_stage(ids, packing)
            outputs = exchange.local_outputs(aux_hidden, output)
            if exchange.is_last:
                yield self._gather(self._collect(ids, outputs), starts)
                continue
            if in_flight.is_full:
                in_flight.make_room()
            sent = exchange.send_hidden(output)
            in_flight.add(sent, exchange.send_outputs(outputs, exchange.stages - 1))
            yield None
        in_flight.finish()

    def _concatenate(
        self, documents: Sequence[np.ndarray]
    ) -> tuple[Tensor, Packing | None, list[int]]:
        """Return ids [1, S], the packing (None for one document), and where each document begins;
        padding is a document of its own at the end."""
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

    def _collect(self, ids: Tensor, outputs: list[Tensor]) -> BaseOutputs:
        """Receive the other stages' outputs and join them with this stage's."""
        shape = self.base.local_shape(ids)
        parts: dict[int, Part] = {self.exchange.stage: outputs}
        for stage in range(self.exchange.stage):
            if message := self.exchange.receive_outputs(shape, stage):
                parts[stage] = message
        return self.exchange.assemble(parts)

    def _gather(self, outputs: BaseOutputs, starts: list[int]) -> SequenceRows:
        """Gather [S', 1, H] hidden states over context parallelism. Two all-gathers."""
        features, final_hidden = (
            gather_sequence(hidden[:, 0], self.cp_group)
            for hidden in (outputs.features, outputs.final_hidden)
        )
        return SequenceRows(features, final_hidden, starts)
