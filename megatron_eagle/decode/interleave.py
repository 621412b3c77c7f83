"""Interleaved decoding of several batches, so that no pipeline stage idles while another computes.

The forwards of one batch depend on each other: each needs the tokens that the last one chose. With
as many batches as stages, the first stage runs the second batch while the second stage runs the
first batch. A batch is a generator that yields before and after every forward of this stage; all
batches yield at the same points.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable

import torch

type Steps[Result] = Generator[None, None, Result]


@torch.no_grad()
def interleave[Result](batches: Iterable[Steps[Result]]) -> list[Result]:
    """Advance all batches in turn until each has returned; return their results in order."""
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
