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


def measure(
    forward: Callable[[], Tensor], resting: Iterable[Tensor], iters: int, warmup: int = 2
) -> dict[str, float]:
    """Measure ``forward()`` (returns the scalar loss) and its backward.

    ``resting``: parameters and inputs; those that require a gradient keep their ``.grad``.
    """
    resting = list(resting)
    parameters = [x for x in resting if x.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    cuda = parameters[0].is_cuda

    def step() -> Tensor:
        loss = forward()
        loss.backward()
        return loss.detach()

    for _ in range(max(1, warmup)):
        loss = step()
    cpu, wall = [], []
    for _ in range(iters):
        if cuda:
            torch.cuda.synchronize()
        start = time.process_time(), time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
    return {
        "cpu_ms": round(1e3 * statistics.median(cpu), 1),
        "wall_ms": round(1e3 * statistics.median(wall), 1),
        "peak_mib": round((_cuda_peak(step) if cuda else _cpu_peak(step)) / MIB, 1),
        "saved_mib": round(_saved(forward, resting) / MIB, 1),
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
