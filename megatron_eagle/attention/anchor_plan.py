"""Plan which context rows each block of a block draft sees.

The context is cut into windows of W keys, from the start of each document on. The blocks whose
anchor follows a row of window j see all keys of the windows before it, and those of window j up to
the row before the anchor. Windows go together in slabs. Only the host works here.

Shape letters: Q sequences of S context rows, R blocks that have a context, w windows of a slab, W
rows of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 128
"""Context rows of a window. A wide one has fewer rectangles; folded, more rows that are no
anchor's."""
SLAB = 16
"""Windows that are folded at a time, on a GPU: W * B rows of queries each."""


class Anchor(NamedTuple):
    """Where a block's context ends: its last row, its sequence, and its document's first row."""

    sequence: int
    document: int
    row: int


@dataclass(frozen=True)
class Window:
    """Blocks whose context ends in one window, and the rows that they see.

    Attributes:
        blocks: which blocks.
        sequence: of which sequence.
        before: the rows of the document's windows before this one, which all of the blocks see.
        own: the window's rows up to the last that one of the blocks sees.
        seen: [blocks] int64 on the host, how many of ``own`` each of them sees; a CPU's masks are
            made of it.
    """

    blocks: slice
    sequence: int
    before: slice
    own: slice
    seen: Tensor


@dataclass(frozen=True)
class Slab:
    """Windows that a GPU folds together, and their blocks.

    Attributes:
        blocks: the blocks of all of them.
        windows: each by itself.
        keys: [w, W] int64, flat rows [Q * S] of each window, to fold them.
        place: [blocks] int64, index of each block in [w * W], to fold it.
    """

    blocks: slice
    windows: Sequence[Window]
    keys: Tensor
    place: Tensor


@dataclass(frozen=True)
class AnchorPlan:
    """Who sees what of N blocks: the first ``count`` have a context, the others are padding."""

    count: int
    slabs: Sequence[Slab]

    @classmethod
    def of(
        cls, anchors: Sequence[Anchor], length: int, window: int = WINDOW, slab: int = SLAB
    ) -> AnchorPlan:
        """Plan for ``anchors``, whose equal windows must be neighbours, in sequences of ``length``
        context rows."""

        def key(item: tuple[int, Anchor]) -> tuple[int, int]:
            _, (sequence, document, row) = item
            return sequence, document + (row - document) // window * window

        windows = [
            _window(start, list(items)) for (_, start), items in groupby(enumerate(anchors), key)
        ]
        slabs = [
            _slab(windows[first : first + slab], length, window)
            for first in range(0, len(windows), slab)
        ]
        return cls(len(anchors), slabs)

    def map(self, move: Callable[[Tensor], Tensor]) -> AnchorPlan:
        """Return the plan with ``move`` applied to what a GPU reads of it."""
        slabs = [replace(slab, keys=move(slab.keys), place=move(slab.place)) for slab in self.slabs]
        return replace(self, slabs=slabs)


def _window(start: int, items: Sequence[tuple[int, Anchor]]) -> Window:
    seen = torch.tensor([anchor.row + 1 - start for _, anchor in items])
    sequence, document, _ = items[0][1]
    return Window(
        blocks=slice(items[0][0], items[-1][0] + 1),
        sequence=sequence,
        before=slice(document, start),
        own=slice(start, start + int(seen.max())),
        seen=seen,
    )


def _slab(windows: Sequence[Window], length: int, window: int) -> Slab:
    # Keys behind the last anchor's are seen by no block; any row will do.
    rows = torch.arange(window)
    keys = [(rows + each.own.start).clamp(max=length - 1) + each.sequence * length
            for each in windows]  # fmt: skip
    place = [number * window + each.seen - 1 for number, each in enumerate(windows)]
    blocks = slice(windows[0].blocks.start, windows[-1].blocks.stop)
    return Slab(blocks, windows, torch.stack(keys), torch.cat(place))
