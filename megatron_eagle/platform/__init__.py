"""Prepare Megatron for where it runs: a few patches on every device, CPU and gloo without CUDA.

* ``patches``: what Megatron needs on every device.
* ``cpu/``: everything that only runs without CUDA, one door for all of it.
* ``compiler``, ``profiling``: ``--eagle-compile`` and ``--eagle-nvtx``.

``enable`` is the one call. Importing this package changes nothing.
"""

from __future__ import annotations

import torch

from megatron_eagle.platform import cpu, patches
from megatron_eagle.platform.cpu.environment import recommended_environment

__all__ = ["enable", "is_enabled", "recommended_environment"]


def enable() -> bool:
    """Make Megatron's models, optimizers and ``pretrain()`` run here, with or without CUDA.

    Call it before a model or an optimizer is built. It imports Megatron before it changes PyTorch,
    so it does not matter whether Megatron was imported earlier; a process that calls it first is
    spared a warning that there is no CUDA runtime. Calling it again changes nothing.
    ``--distributed-backend gloo`` and ``--transformer-impl local`` are still the caller's to pass.

    Returns:
        True when this process now runs Megatron on its CPU, False when there is a CUDA device.

    Raises:
        MovedSymbolError: this Megatron release lacks a name to be patched; the message names it.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        cpu.silence_cuda_search()
    patches.apply()
    if on_cpu:
        cpu.apply()
    return on_cpu


def is_enabled() -> bool:
    """Return whether ``enable`` has made this process run Megatron on its CPU."""
    return cpu.is_applied()
