"""Choose the environment variables of processes that run Megatron on a CPU."""

from __future__ import annotations

import os


def recommended_environment(ranks: int = 1) -> dict[str, str]:
    """Return the environment variables that a launcher should set for each of ``ranks`` processes.

    They are read when a process starts, so setting them inside it is too late.

    * ``MALLOC_*_``: keep freed memory in the process. By default glibc returns every large buffer
      to the kernel, and the page faults on the next one cost more than the matrix product in it
      (72 against 316 GFLOP/s for an fp32 1024x576x8192 product).
    * ``OMP_NUM_THREADS``: the cores shared out among the ranks.
    * ``CUDA_DEVICE_MAX_CONNECTIONS``: required by Megatron's argument check.

    Raises:
        ValueError: ``ranks`` is less than 1.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
        "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
        "MALLOC_TOP_PAD_": str(256 * 2**20),
        "OMP_NUM_THREADS": str(max(1, (cores or 1) // ranks)),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
