"""Messages that a pipeline stage has sent and that may not have left yet."""

from __future__ import annotations

from collections import deque

from megatron_eagle.pipeline.links import Message

SENDS_AHEAD = 2
"""Micro-batches whose hidden states may be under way to the next stage before this one waits."""


class InFlight:
    """Keeps sent tensors alive until they have left, and bounds how many there are.

    Training hands it from iteration to iteration, since the next one's first base forwards are run,
    and their results sent, while this one's are still leaving.
    """

    def __init__(self) -> None:
        self._queue: deque[list[Message]] = deque()
        self._to_owner: dict[int, Message] = {}

    @property
    def is_full(self) -> bool:
        """Whether ``make_room`` must come before the next ``add``."""
        return len(self._queue) == SENDS_AHEAD

    def make_room(self) -> None:
        """Wait until the messages of the oldest ``add`` have left."""
        for message in self._queue.popleft():
            message.wait()

    def add(self, *messages: Message | None) -> None:
        """Keep the messages sent of one micro-batch; None stands for nothing sent."""
        self._queue.append([message for message in messages if message is not None])

    def wait_for_owner(self, owner: int) -> None:
        """Wait until the last message to the stage ``owner`` has left. If that stage has not
        received it yet, this blocks."""
        if owner in self._to_owner:
            self._to_owner.pop(owner).wait()

    def add_to_owner(self, owner: int, message: Message) -> None:
        """Keep the message sent to the stage ``owner``, to which no other may be under way."""
        assert owner not in self._to_owner
        self._to_owner[owner] = message

    def finish(self) -> None:
        """Wait until everything has left."""
        while self._queue:
            self.make_room()
        for message in self._to_owner.values():
            message.wait()
        self._to_owner.clear()
