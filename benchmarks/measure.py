"""Time and memory of one training step, measured the same way for every implementation.

* ``cpu_ms``, ``wall_ms``: medians over the iterations, all threads of the process.
* ``peak_mib``: the highest sum of live tensor memory during one step, above what was live before
  it, as PyTorch's allocator reports to the profiler; temporaries inside operators included.
  Gradients exist before the step, as they do in Megatron's buffers.
* ``saved_mib``: memory that autograd's graph holds between forward and backward, each storage
  once, parameters and inputs left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MIB = 2**20


class Step:
    """Forward and backward of one sequence, of any implementation.

    ``forward()`` returns the scalar loss. ``resting``: parameters and inputs; those that require a
    gradient keep their ``.grad``.
    """

    def __init__(self, forward: Callable[[], Tensor], resting: Iterable[Tensor]) -> None:
        self.forward, self.resting = forward, list(resting)
        parameters = [x for x in self.resting if x.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.cuda = parameters[0].is_cuda

    def run(self) -> Tensor:
        """Run it; return the loss."""
        loss = self.forward()
        loss.backward()
        return loss.detach()

    def timed(self) -> dict[str, float]:
        """Run it; return ``cpu_ms`` and ``wall_ms``."""
        if self.cuda:
            torch.cuda.synchronize()
        start = time.process_time(), time.perf_counter()
        self.run()
        if self.cuda:
            torch.cuda.synchronize()
        cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
        return {"cpu_ms": round(1e3 * cpu, 1), "wall_ms": round(1e3 * wall, 1)}

    def memory(self) -> dict[str, float]:
        """Run it; return ``peak_mib`` and ``saved_mib``."""
        peak = _cuda_peak(self.run) if self.cuda else _cpu_peak(self.run)
        saved = _saved(self.forward, self.resting)
        return {"peak_mib": round(peak / MIB, 1), "saved_mib": round(saved / MIB, 1)}


def measure(
    forward: Callable[[], Tensor], resting: Iterable[Tensor], iters: int, warmup: int = 2
) -> dict[str, float]:
    """Measure a :class:`Step` of these: medians over ``iters`` iterations, memory and loss."""
    step = Step(forward, resting)
    for _ in range(max(1, warmup)):
        loss = step.run()
    times = [step.timed() for _ in range(iters)]
    return {
        **{name: statistics.median(each[name] for each in times) for name in times[0]},
        **step.memory(),
        "loss": float(loss),
        "threads": torch.get_num_threads(),
    }


def _cuda_peak(step: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(step: Callable[[], Any]) -> int:
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _saved(forward: Callable[[], Tensor], resting: list[Tensor]) -> int:
    known = {x.untyped_storage().data_ptr() for x in resting}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(sizes.values())
    del loss
    return total
