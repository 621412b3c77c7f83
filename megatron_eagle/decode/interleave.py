"""Several batches decoded at the same time, so that no pipeline stage waits for all the others.

A batch's forwards wait for each other: each needs the tokens that the last one gave. With one batch
a stage per stage they follow each other through the stages: while the second stage runs the first
batch, the first stage runs the second batch. A batch is a generator that stops before and after
every forward of this stage, and all batches stop at the same places.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable

import torch

type Steps[Result] = Generator[None, None, Result]


@torch.no_grad()
def together[Result](batches: Iterable[Steps[Result]]) -> list[Result]:
    """Go on with all batches in turn until each has returned; what they returned, in order."""
    running = dict(enumerate(batches))
    results: dict[int, Result] = {}
    while running:
        for index, batch in list(running.items()):
            try:
                next(batch)
            except StopIteration as end:
                results[index] = end.value
                del running[index]
    return [results[index] for index in sorted(results)]
