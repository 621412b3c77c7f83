"""Optional NVTX ranges: nothing unless ``--eagle-nvtx`` is given and CUDA is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_state = {"enabled": False}


def mark_ranges(enabled: bool = True) -> None:
    """Emit NVTX ranges from now on, if a CUDA device can show them."""
    _state["enabled"] = enabled and torch.cuda.is_available()


@contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """Mark the enclosed work as ``eagle.<name>`` in a CUDA profile."""
    if not _state["enabled"]:
        yield
        return
    torch.cuda.nvtx.range_push(f"eagle.{name}")
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
