"""Mark ranges of work in a profile: of PyTorch's profiler, and by NVTX with Megatron's helper.

``compat.configure_nvtx_profiling`` switches the NVTX ranges on (``--eagle-nvtx``), together with
those that Megatron has in its own layers. They are off otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_eagle.compat import nvtx_range_pop, nvtx_range_push


@contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """Mark the enclosed work as ``eagle.<name>``, closed also when an exception leaves it."""
    message = f"eagle.{name}"
    nvtx_range_push(message)
    try:
        with torch.profiler.record_function(message):
            yield
    except BaseException:
        _close_through(message)
        raise
    nvtx_range_pop(message)


def _close_through(message: str) -> None:
    """Close the ranges that Megatron's code left open when it raised, and the range ``message``.

    On a range of another name Megatron's pop forgets the name and raises before it closes the
    range (megatron/core/utils.py).
    """
    while True:
        try:
            return nvtx_range_pop(message)
        except ValueError:
            torch.cuda.nvtx.range_pop()
