"""Peeking at the first samples of the next iteration before they are taken."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any


class Peekable:
    """An iterator whose next items can be looked at; they are still to be taken."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self._seen: deque[Any] = deque()

    def __iter__(self) -> Peekable:
        return self

    def __next__(self) -> Any:
        return self._seen.popleft() if self._seen else next(self.source)

    def peek(self, count: int) -> list[Any]:
        """Return the next ``count`` items, which stay to be taken."""
        while len(self._seen) < count:
            self._seen.append(next(self.source))
        return list(self._seen)[:count]


def peek(iterator: Any, count: int) -> list[Any]:
    """Return the next ``count`` samples of Megatron's training iterator, which stay to be taken.

    That iterator records what is taken from it, to replay an iteration whose result Megatron's
    rerun machine rejects. So the samples are read from the iterator underneath, and taken from
    Megatron's in their own iteration."""
    if not isinstance(iterator.iterable, Peekable):
        iterator.iterable = Peekable(iterator.iterable)
    return iterator.iterable.peek(count)
