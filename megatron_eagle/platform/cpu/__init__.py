"""Run Megatron without CUDA: CPU tensors, the gloo backend, one idle device.

Nothing here is used where there is a CUDA device. ``apply`` does what needs patching:

* ``devices``: device arguments that name a CUDA device mean the CPU.
* ``cuda_surface``: device queries, streams, events and random generators of ``torch.cuda``.
* ``megatron_patches``: Megatron code that takes a CUDA device for granted.
* ``linear``, ``products``, ``kernel_choice``: fp32 products by oneDNN where that is faster than
  MKL.
* ``rotary``: rotary embedding without copies.
* ``environment``: variables that a launcher should set for its processes.
"""

from __future__ import annotations

import logging

from megatron_eagle.compat import patches_of, require
from megatron_eagle.platform.cpu.cuda_surface import provide_idle_device, share_the_cpu_generator
from megatron_eagle.platform.cpu.devices import LAST_PATCHED, redirect_devices_to_cpu
from megatron_eagle.platform.cpu.linear import speed_up_linears
from megatron_eagle.platform.cpu.megatron_patches import (
    allow_trainer_without_cuda,
    exchange_uneven_splits,
    pass_alltoall_splits_as_numpy,
)
from megatron_eagle.platform.cpu.rotary import speed_up_rotary


def silence_cuda_search() -> None:
    """Keep PyTorch from warning, when Megatron is imported, that there is no CUDA runtime."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def apply() -> None:
    """Patch Megatron and PyTorch; the modules of the functions say why each patch is needed."""
    speed_up_linears()
    speed_up_rotary()
    pass_alltoall_splits_as_numpy()
    exchange_uneven_splits()
    allow_trainer_without_cuda()
    provide_idle_device()
    share_the_cpu_generator()
    redirect_devices_to_cpu()


def is_applied() -> bool:
    """Return whether ``apply`` has run to its end in this process."""
    return bool(patches_of(require(LAST_PATCHED)))
