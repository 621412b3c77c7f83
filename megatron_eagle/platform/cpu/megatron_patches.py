"""Patch Megatron code that takes a CUDA device or NCCL for granted.

Shape letters: N tokens of one rank, H channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.compat import patch, patch_all, require


def pass_alltoall_splits_as_numpy() -> None:
    """Give expert parallelism's all-to-all its split sizes as an array, as it expects them.

    megatron/core/transformer/moe/moe_utils.py converts them only on their way from a CUDA device.
    """

    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    patch(
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        maybe_move_tensor_to_cpu,
        "split sizes of an all-to-all as an array",
    )


def exchange_uneven_splits() -> None:
    """Gather and reduce-scatter parts of different sizes, which gloo cannot: pad to the largest.

    megatron/core/tensor_parallel/mappings.py exchanges such parts for the experts of several
    tensor-parallel ranks, which get as many tokens as the router sends them.
    """
    mappings = "megatron.core.tensor_parallel.mappings:"
    gather = f"{mappings}_gather_along_first_dim"
    reduce_scatter = f"{mappings}_reduce_scatter_along_first_dim"
    patch_all(
        {
            gather: _padded_gather(require(gather)),
            reduce_scatter: _padded_reduce_scatter(require(reduce_scatter)),
        },
        "gloo exchanges parts of one size only",
    )


def _padded_gather(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap the all-gather of a rank's part [N, H] for parts of different N."""

    @functools.wraps(original)
    def gather(part: Tensor, group: Any, output_split_sizes: Any = None, *rest: Any) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return original(part, group, output_split_sizes, *rest)
        padded = _padded(part, max(output_split_sizes))
        gathered = padded.new_empty(group.size() * padded.shape[0], *padded.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, padded, group=group)
        parts = zip(gathered.chunk(group.size()), output_split_sizes, strict=True)
        return torch.cat([x[:size] for x, size in parts])

    return gather


def _padded_reduce_scatter(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap the reduce-scatter of all ranks' parts, one behind the other, for different N."""

    @functools.wraps(original)
    def reduce_scatter(
        parts: Tensor, group: Any, input_split_sizes: Any = None, *rest: Any
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return original(parts, group, input_split_sizes, *rest)
        largest = max(input_split_sizes)
        padded = torch.stack([_padded(x, largest) for x in parts.split(list(input_split_sizes))])
        reduced = padded.new_empty(padded.shape[1:])
        torch.distributed.reduce_scatter_tensor(reduced, padded.flatten(0, 1), group=group)
        return reduced[: input_split_sizes[group.rank()]]

    return reduce_scatter


def _padded(part: Tensor, length: int) -> Tensor:
    """Append zeros to a part [N, H] until it has ``length`` tokens."""
    return torch.cat([part, part.new_zeros(int(length) - part.shape[0], *part.shape[1:])])


def allow_trainer_without_cuda() -> None:
    """Pass the ``allow_no_cuda`` that ``initialize_megatron`` has and ``pretrain`` never passes.

    megatron/training/training.py holds the function under its own name.
    """
    path = "megatron.training.training:initialize_megatron"
    original = require(path)

    @functools.wraps(original)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "allow_no_cuda": True})

    patch(path, initialize_megatron, "pretrain() without a CUDA device")
