"""A process group of one rank, without processes."""

from __future__ import annotations


class OneRank:
    """A group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0
