"""Answer the part of ``torch.cuda`` that Megatron calls unconditionally for one idle device.

``torch.cuda.is_available()`` stays False: Megatron reads it to decide about Transformer Engine,
Triton and NCCL, and all of them must stay off.
"""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from megatron_eagle.compat import patch_all, require
from megatron_eagle.platform.cpu.devices import CPU

# With device_count() == 0 Megatron builds no model-parallel group and says nothing
# (megatron/training/initialize.py, _initialize_distributed). Capability (0, 0) is below every
# architecture Megatron tests for.
CONSTANTS: dict[str, Any] = {
    "current_device": 0,
    "device_count": 1,
    "get_device_capability": (0, 0),
    "get_device_properties": SimpleNamespace(
        major=0, minor=0, name="cpu", total_memory=0, multi_processor_count=1
    ),
    "memory_allocated": 0,
    "max_memory_allocated": 0,
    "memory_reserved": 0,
    "max_memory_reserved": 0,
    "device_memory_used": 0,
    "empty_cache": None,
    "reset_peak_memory_stats": None,
    "set_device": None,
    "set_stream": None,
    "synchronize": None,
    "nvtx.range_push": 0,
    "nvtx.range_pop": 0,
}


class InertStream:
    """Stream and event of a device that is always synchronous."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> InertStream:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or InertStream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


def provide_idle_device() -> None:
    """Answer device queries, memory statistics, streams, events and NVTX ranges."""
    stream = InertStream()
    patch_all(
        {
            **{f"torch.cuda:{name}": _constant(value) for name, value in CONSTANTS.items()},
            "torch.cuda:memory_stats": lambda device=None: collections.defaultdict(int),
            "torch.cuda:current_stream": _constant(stream),
            "torch.cuda:default_stream": _constant(stream),
            "torch.cuda:stream": lambda stream: contextlib.nullcontext(),
            "torch.cuda:Stream": InertStream,
            "torch.cuda:Event": InertStream,
        },
        "one idle device answers",
    )


def share_the_cpu_generator() -> None:
    """Make the CPU's random generator the device's too: no other generator draws anything.

    Upstream: megatron/core/tensor_parallel/random.py swaps CUDA generator states for its
    model-parallel regions, and warns when the CPU state changed inside one: here it always does.
    """

    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
        torch.set_rng_state(new_state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    def set_cuda_rng_state(
        new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False
    ) -> None:
        torch.set_rng_state(new_state)

    functions = (get_rng_state, set_rng_state, manual_seed)
    patch_all(
        {
            f"{module}:{function.__name__}": function
            for module in ("torch.cuda", "torch.cuda.random")
            for function in functions
        }
        | {"megatron.core.tensor_parallel.random:_set_cuda_rng_state": set_cuda_rng_state},
        "the CPU's random generator is the device's",
    )
    logging.getLogger(require("megatron.core.tensor_parallel.random:__name__")).addFilter(
        _is_not_about_the_cpu_generator
    )


def _is_not_about_the_cpu_generator(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


def _constant(value: Any) -> Callable[..., Any]:
    """Return a function that returns ``value`` whatever it is called with."""
    return lambda *args, **kwargs: value
