"""Split a profile of one step by part of the step and by kind of work, in milliseconds.

A part is a range of the package (``platform/profiling.py``): what its host code launched. With one
rank the loss makes the head's gradient in forward; so backward is that of the unroll.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_FORWARD = "benchmark.forward"
_PARTS = {"unroll": "eagle.unroll", "head, teacher and loss": "eagle.loss"}
_KINDS = {
    "attention": ("flash", "attention"),
    "products": ("::mm", "::addmm", "::bmm", "::linear", "mkldnn_linear", "mkl_linear", "gemm"),
    "Triton kernels": ("triton",),
}


def profile_step(forward: Callable[[], Tensor], device: str) -> tuple[str, dict[str, float]]:
    """Profile the second of two steps; return PyTorch's table, and its parts."""
    forward().backward()
    with torch.profiler.profile() as found:
        with torch.profiler.record_function(_FORWARD):
            loss = forward()
        loss.backward()
        if device != "cpu":
            torch.cuda.synchronize()
    events = found.key_averages()
    by = "cpu" if device == "cpu" else "device"
    table = events.table(sort_by=f"self_{by}_time_total", row_limit=20, max_name_column_width=50)
    return table, split(events, by)


def split(events: Any, by: str) -> dict[str, float]:
    """Return milliseconds by part and by kind of work; ``by``: cpu or device time."""
    ranges = {_FORWARD, *_PARTS.values()}
    whole = {event.key: getattr(event, f"{by}_time_total") for event in events}
    work = [(e.key.lower(), getattr(e, f"self_{by}_time_total")) for e in events]
    # A kernel of a device is listed beside the operator that launched it: count operators.
    if by == "device":
        work = [(e.key.lower(), e.self_device_time_total) for e in events if _on_host(e)]
    total = sum(time for key, time in work if key not in ranges)
    forward = whole.get(_FORWARD, 0.0)
    parts = {name: whole.get(key, 0.0) for name, key in _PARTS.items()}
    found = {f"forward: {name}": time for name, time in parts.items()}
    found["forward: the rest"] = forward - sum(parts.values())
    found["backward"] = total - forward
    for kind, words in _KINDS.items():
        found[f"kind: {kind}"] = sum(t for key, t in work if any(word in key for word in words))
    found["kind: the rest"] = total - sum(t for name, t in found.items() if name.startswith("kind"))
    return {"whole step": total / 1e3, **{name: time / 1e3 for name, time in found.items()}}


def _on_host(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CPU
