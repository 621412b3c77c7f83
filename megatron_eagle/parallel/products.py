"""Multiply matrices: fp32 results of 16-bit factors on a GPU, the fastest kernel on a CPU.

Which kernel a CPU runs is decided in :mod:`megatron_eagle.platform.cpu.products`, and nowhere else.
Shape letters: N rows, M outputs of a row (rows of a weight), H inputs of a row.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.platform.cpu import products as cpu_products

_GPU_OUTPUT_BYTES = 2 << 30


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [N, H] @ weight [M, H]ᵀ -> [N, M] in their dtype.

    Not differentiable; no collective.
    """
    if x.device.type == "cpu":
        return cpu_products.product(x, weight)
    return torch.mm(x, weight.t())


def product_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """Return :func:`product` in fp32; on a GPU it is never rounded to 16 bits on the way."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return product(x, weight).float()


def add_outer_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left [N, M]ᵀ @ right [N, H] to ``total`` [M, H] fp32, in place.

    ``left`` and ``right`` may have 16 bits. Not differentiable; no collective.
    """
    if left.device.type == "cpu":
        cpu_products.add_outer_(total, left, right)
    elif left.dtype == torch.float32:
        total.addmm_(left.t(), right)
    elif left.is_cuda and _adds_halves_to_fp32():
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
    else:
        total += left.t() @ right


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [..., H] @ weight [M, H]ᵀ -> [..., M], differentiable in both; no collective."""
    if x.device.type == "cpu":
        return cpu_products.linear(x, weight)
    return torch.nn.functional.linear(x, weight)


def default_output_bytes(device: torch.device) -> int:
    """Return how many bytes of fp32 results should be made at a time on ``device``.

    With fewer, the products of :func:`add_outer_` waste time: on a GPU each one reads and writes
    the whole ``total``, which takes as long as some 300 to 400 rows do (docs: architecture). A CPU
    is asked what its kernel needs, on the first call and not at import.
    """
    return _GPU_OUTPUT_BYTES if device.type == "cuda" else cpu_products.default_output_bytes()


def agreed_output_bytes(device: torch.device, group: ProcessGroup) -> int:
    """Return the least :func:`default_output_bytes` of the ranks of ``group``, whose processors may
    differ. One all-reduce of a number on CPUs, none on GPUs or for a single rank."""
    size = default_output_bytes(device)
    if device.type == "cuda" or group.size() == 1:
        return size
    least = torch.tensor(size)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=group)
    return int(least)


@cache
def _adds_halves_to_fp32() -> bool:
    """Tell whether ``torch.addmm`` adds a product of 16-bit factors to fp32: not every PyTorch."""
    half = torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda")
    try:
        torch.addmm(half.float(), half, half, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True
