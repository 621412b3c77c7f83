"""Point-to-point messages between the pipeline stages of one tensor- and data-parallel replica.

Every message is posted and returns at once. NCCL runs the messages of two ranks in the order in
which both posted them; three groups (the base's hidden states; captured layers to later stages; to
earlier ones) keep that order the same on both sides, because between two ranks each group carries
one direction only, micro-batch after micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass
class Message:
    """A tensor under way, in either direction; it must stay alive until :meth:`wait`."""

    tensor: Tensor
    work: Any

    def wait(self) -> Tensor:
        """Until the tensor has arrived, or left; on a GPU the stream waits, not the host."""
        self.work.wait()
        return self.tensor


class StageLinks:
    """The links of this rank to the other stages of its pipeline ``group``.

    Made by all ranks of the world at once: torch makes groups that way.
    """

    def __init__(self, group: ProcessGroup, timeout: timedelta | None = None) -> None:
        self.group, self.stage, self.stages = group, group.rank(), group.size()
        self.ranks = torch.distributed.get_process_group_ranks(group)
        every: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, self.ranks)
        pipelines = sorted({tuple(ranks) for ranks in every})

        def another_group() -> ProcessGroup:
            mine, _ = torch.distributed.new_subgroups_by_enumeration(
                [list(ranks) for ranks in pipelines], timeout=timeout
            )
            return mine

        self._hidden, self._later, self._earlier = (another_group() for _ in range(3))
        self._connect()

    def _connect(self) -> None:
        """Exchange a number between every two stages in every group.

        NCCL connects two ranks at their first message, and the host waits there for the other one:
        posted in any order but one for all, first messages can wait for each other forever.
        """
        number = torch.zeros(1, device=torch.cuda.current_device())
        for group in (self._hidden, self._later, self._earlier):
            for early, late in combinations(range(self.stages), 2):
                if self.stage == early:
                    torch.distributed.send(number, self.ranks[late], group=group)
                elif self.stage == late:
                    torch.distributed.recv(number, self.ranks[early], group=group)

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def send_hidden(self, hidden: Tensor) -> Message:
        """To the next stage."""
        return self._send(hidden, self.stage + 1, self._hidden)

    def receive_hidden(self, buffer: Tensor) -> Message:
        """From the stage before."""
        return self._receive(buffer, self.stage - 1, self._hidden)

    def send_aux(self, tensor: Tensor, stage: int) -> Message:
        """To the owner ``stage`` of a micro-batch."""
        return self._send(tensor, stage, self._later if stage > self.stage else self._earlier)

    def receive_aux(self, buffer: Tensor, stage: int) -> Message:
        """From ``stage``, as the owner."""
        return self._receive(buffer, stage, self._later if stage < self.stage else self._earlier)

    def _send(self, tensor: Tensor, stage: int, group: ProcessGroup) -> Message:
        tensor = tensor.contiguous()
        return Message(tensor, torch.distributed.isend(tensor, self.ranks[stage], group=group))

    def _receive(self, buffer: Tensor, stage: int, group: ProcessGroup) -> Message:
        return Message(buffer, torch.distributed.irecv(buffer, self.ranks[stage], group=group))
