"""Packing of documents into samples: best-fit decreasing, over the whole data set at once."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def pack(lengths: np.ndarray, capacity: int, seed: int) -> list[np.ndarray]:
    """Group the indices of ``lengths`` [N documents] so that no group's sum exceeds ``capacity``.

    Every index is in one group. The longest document is placed first, and each goes where it leaves
    the least room. The order inside a group and the order of ties are random and depend on ``seed``
    alone.
    """
    assert lengths.size == 0 or int(lengths.max()) <= capacity
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    groups: list[list[int]] = []
    room: dict[int, list[int]] = {}  # free tokens -> groups with that many
    free: list[int] = []  # the keys of room, ascending
    for index in order.tolist():
        length = int(lengths[index])
        at = bisect_left(free, length)
        if at == len(free):
            group, left = len(groups), capacity - length
            groups.append([index])
        else:
            group, left = room[free[at]].pop(), free[at] - length
            groups[group].append(index)
            if not room[free[at]]:
                del room[free[at]]
                del free[at]
        if left:
            if left not in room:
                room[left] = []
                insort(free, left)
            room[left].append(group)
    return [rng.permutation(np.asarray(group)) for group in groups]
