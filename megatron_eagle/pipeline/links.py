"""Point-to-point messages between the pipeline stages of one tensor- and data-parallel replica.

Every message is posted and returns at once. NCCL runs the messages of two ranks in the order in
which both posted them; three groups (the base's hidden states; aux hidden states to later stages;
to earlier ones) keep that order the same on both sides, because between two ranks each group
carries one direction only, micro-batch after micro-batch.

Shapes: S' this rank's part of the sequence, B batch, H hidden size; n hidden states side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass
class Message:
    """A tensor being sent or received; it must stay alive until ``wait``."""

    tensor: Tensor
    work: Any

    def wait(self) -> Tensor:
        """Wait until the tensor has arrived or left, and return it; on a GPU the CUDA stream waits,
        not the host."""
        self.work.wait()
        return self.tensor


class StageLinks:
    """Links from this rank to the other stages of its pipeline ``group``.

    Collective: every rank of the world must construct it, since torch makes process groups that
    way.
    """

    def __init__(self, group: ProcessGroup, timeout: timedelta | None = None) -> None:
        self.group, self.stage, self.stages = group, group.rank(), group.size()
        self.ranks = torch.distributed.get_process_group_ranks(group)
        by_rank: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(by_rank, self.ranks)
        pipelines = sorted({tuple(ranks) for ranks in by_rank})

        def new_group() -> ProcessGroup:
            group, _ = torch.distributed.new_subgroups_by_enumeration(
                [list(ranks) for ranks in pipelines], timeout=timeout
            )
            return group

        self._hidden, self._later, self._earlier = (new_group() for _ in range(3))
        self._connect()

    def _connect(self) -> None:
        """Exchange a number between any two stages that a group has messages for: neighbours where
        the base's hidden states go on, every two for aux hidden states.

        NCCL connects two ranks at their first message, and the host waits there for the other one:
        unless all ranks post their first messages in one common order, those can deadlock.
        """
        number = torch.zeros(1, device=torch.cuda.current_device())
        every_two = list(combinations(range(self.stages), 2))
        neighbors = list(pairwise(range(self.stages)))
        links = (self._hidden, neighbors), (self._later, every_two), (self._earlier, every_two)
        for group, pairs in links:
            for early, late in pairs:
                if self.stage == early:
                    torch.distributed.send(number, self.ranks[late], group=group)
                elif self.stage == late:
                    torch.distributed.recv(number, self.ranks[early], group=group)

    def send_hidden(self, hidden: Tensor) -> Message:
        """Post the send of ``hidden`` [S', B, H] to the next stage."""
        return self._send(hidden, self.stage + 1, self._hidden)

    def receive_hidden(self, buffer: Tensor) -> Message:
        """Post the receive of the previous stage's hidden states into ``buffer`` [S', B, H]."""
        return self._receive(buffer, self.stage - 1, self._hidden)

    def send_aux(self, tensor: Tensor, stage: int) -> Message:
        """Post the send of ``tensor`` [S', B, n * H] to the stage ``stage`` that reads it."""
        return self._send(tensor, stage, self._later if stage > self.stage else self._earlier)

    def receive_aux(self, buffer: Tensor, stage: int) -> Message:
        """Post the receive of ``buffer`` [S', B, n * H] from the stage ``stage``."""
        return self._receive(buffer, stage, self._later if stage < self.stage else self._earlier)

    def _send(self, tensor: Tensor, stage: int, group: ProcessGroup) -> Message:
        tensor = tensor.contiguous()
        return Message(tensor, torch.distributed.isend(tensor, self.ranks[stage], group=group))

    def _receive(self, buffer: Tensor, stage: int, group: ProcessGroup) -> Message:
        return Message(buffer, torch.distributed.irecv(buffer, self.ranks[stage], group=group))
