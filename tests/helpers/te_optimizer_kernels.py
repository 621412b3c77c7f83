"""The kernels that Megatron's optimizer takes from Transformer Engine, in plain PyTorch.

Arguments are those of the compiled functions: a chunk size, a flag that skips the call if it is not
zero, and lists of tensors, of which the last named ones are written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

L2, DECOUPLED = 0, 1
"""Modes of ``multi_tensor_adam``: what weight decay is added to."""


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the norm [1] of all tensors together and, if asked for, of each [tensors]."""
    (tensors,) = tensor_lists
    norms = torch.stack([tensor.float().norm() for tensor in tensors])
    return norms.norm().reshape(1), norms if per_tensor else norms.new_empty(0)


def multi_tensor_scale(
    chunk_size: int, is_infinite: Tensor, tensor_lists: list[list[Tensor]], scale: float
) -> None:
    """Write the first list times ``scale`` to the second."""
    sources, targets = tensor_lists
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source.float() * scale)
        if not bool(target.isfinite().all()):
            is_infinite.fill_(1)


def multi_tensor_scale_tensor(
    chunk_size: int, is_infinite: Tensor, tensor_lists: list[list[Tensor]], scale: Tensor
) -> None:
    """Do the same with a scale that is a tensor of one number."""
    multi_tensor_scale(chunk_size, is_infinite, tensor_lists, float(scale))


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Update parameters and both moments; the lists are gradients, parameters, and moments."""
    if int(noop_flag):
        return
    first = 1 - beta1**step if bias_correction else 1.0
    second = 1 - beta2**step if bias_correction else 1.0
    for gradient, parameter, mean, square in zip(*tensor_lists, strict=True):
        change = gradient.float()
        if mode == L2:
            change = change + weight_decay * parameter
        mean.copy_(beta1 * mean + (1 - beta1) * change)
        square.copy_(beta2 * square + (1 - beta2) * change * change)
        update = (mean / first) / ((square / second).sqrt() + epsilon)
        if mode == DECOUPLED:
            update = update + weight_decay * parameter
        parameter.sub_(lr * update)


def optimizer_kernels() -> dict[str, Any]:
    """Return these functions by the names that the compiled part has them under."""
    functions = (
        multi_tensor_l2norm,
        multi_tensor_scale,
        multi_tensor_scale_tensor,
        multi_tensor_adam,
    )
    return {function.__name__: function for function in functions}
