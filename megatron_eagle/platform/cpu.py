"""Megatron on a machine without CUDA: CPU tensors and the gloo backend.

    from megatron_eagle.platform import cpu
    cpu.enable()      # before the model is built; before or after importing Megatron

Importing this module changes nothing. :func:`enable` does, once, and only where there is no CUDA
device. What it changes is listed in its body; each function there says why it is needed.
"""

from __future__ import annotations

import logging
import os

import torch

from megatron_eagle.platform.adam import use_checkpointable_adam
from megatron_eagle.platform.cpu_linear import speed_up_linears
from megatron_eagle.platform.cuda_surface import provide_idle_device, share_the_cpu_generator
from megatron_eagle.platform.devices import redirect_devices_to_cpu
from megatron_eagle.platform.megatron_patches import (
    allow_sequence_parallel_torch_norm,
    allow_trainer_without_cuda,
    exchange_uneven_splits,
    load_optimizer_state_without_grad,
    pass_alltoall_splits_as_numpy,
    skip_helper_build_without_makefile,
)

_enabled = False
_on_any_device = False


def enable() -> bool:
    """Make Megatron's models, optimizers and ``pretrain()`` run on CPU with gloo.

    Call it before a model or an optimizer is built; calling it again changes nothing. Where
    ``torch.cuda.is_available()``, it does only what Megatron needs there too: it sets
    ``CUDA_DEVICE_MAX_CONNECTIONS`` unless it is set, keeps Megatron from building dataset helpers
    that its wheel already holds, lets the norms of local layers run under sequence parallelism, and
    gives it an Adam whose state can be loaded where Transformer Engine and Apex are missing.
    ``--distributed-backend gloo`` and ``--transformer-impl local`` are still the caller's to pass.

    Returns:
        True when this process now runs Megatron on its CPU, False when there is a CUDA device.

    Raises:
        MovedSymbolError: this Megatron release lacks a name to be patched; the message names it.
    """
    global _enabled, _on_any_device
    if not _on_any_device:
        # validate_args insists on it for tensor, sequence and context parallelism.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if not torch.cuda.is_available():
            # Megatron imports it, and it tells every process that there is no CUDA runtime.
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        skip_helper_build_without_makefile()
        allow_sequence_parallel_torch_norm()
        use_checkpointable_adam()
        load_optimizer_state_without_grad()
        _on_any_device = True
    if _enabled:
        return True
    if torch.cuda.is_available():
        return False
    redirect_devices_to_cpu()
    provide_idle_device()
    share_the_cpu_generator()
    speed_up_linears()
    pass_alltoall_splits_as_numpy()
    exchange_uneven_splits()
    allow_trainer_without_cuda()
    _enabled = True
    return True


def is_enabled() -> bool:
    """Whether :func:`enable` has patched this process."""
    return _enabled


def recommended_environment(ranks: int = 1) -> dict[str, str]:
    """Environment variables a launcher should set for each of ``ranks`` CPU processes.

    They are read when a process starts, so setting them inside it is too late.

    * ``MALLOC_*_``: keep freed memory in the process. By default glibc returns every large buffer
      to the kernel, and the page faults on the next one cost more than the matrix product in it
      (72 against 316 GFLOP/s for an fp32 1024x576x8192 product).
    * ``OMP_NUM_THREADS``: the cores shared out among the ranks.
    * ``CUDA_DEVICE_MAX_CONNECTIONS``: wanted by Megatron's argument check.
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
