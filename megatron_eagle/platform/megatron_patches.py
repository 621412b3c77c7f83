"""What Megatron itself needs to run without CUDA: one small function for each obstacle."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.compat import replace, require


def skip_helper_build_without_makefile() -> None:
    """Do not run ``make`` where there is nothing to make (on GPUs too).

    The wheel ships ``helpers_cpp`` compiled, without its Makefile; megatron/training/initialize.py
    runs ``make`` regardless and exits when it fails (megatron/core/datasets/utils.py).
    """
    path = "megatron.core.datasets.utils:compile_helpers"
    require(path)
    source = require("megatron.core.datasets.utils:__file__")
    if not Path(source).with_name("Makefile").exists():
        require("megatron.core.datasets.helpers_cpp:build_blending_indices")
        replace(path, lambda: None)


def allow_sequence_parallel_torch_norm() -> None:
    """Let the torch norm of local layer specs run under sequence parallelism.

    megatron/core/transformer/torch_norm.py refuses it because torch's norms do not mark their
    parameters; marked, ``finalize_model_grads`` sums their gradients over the TP group.
    """
    path = "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__"
    original = require(path)

    @functools.wraps(original)
    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        unsharded = copy.copy(config)
        unsharded.sequence_parallel = False
        norm = original(cls, unsharded, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    replace(path, staticmethod(new))


def load_optimizer_state_without_grad() -> None:
    """Load an fp32 distributed optimizer in place, which autograd forbids outside ``no_grad``.

    megatron/core/optimizer/distrib_optimizer.py decorates the other loaders and misses this one.
    """
    path = (
        "megatron.core.optimizer.distrib_optimizer:"
        "DistributedOptimizer.load_parameter_state_from_dp_reshardable"
    )
    replace(path, torch.no_grad()(require(path)))


def pass_alltoall_splits_as_numpy() -> None:
    """Give expert parallelism's all-to-all its split sizes as an array, as it expects them.

    megatron/core/transformer/moe/moe_utils.py converts them only on their way from a CUDA device.
    """

    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    replace(
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        maybe_move_tensor_to_cpu,
    )


def exchange_uneven_splits() -> None:
    """Gather and reduce-scatter parts of different sizes, which gloo cannot: padded to the largest.

    megatron/core/tensor_parallel/mappings.py does it for the experts of several tensor-parallel
    ranks, whose tokens are as many as the router sends them.
    """
    mappings = "megatron.core.tensor_parallel.mappings:"
    gather = require(mappings + "_gather_along_first_dim")
    reduce_scatter = require(mappings + "_reduce_scatter_along_first_dim")

    @functools.wraps(gather)
    def gather_along_first_dim(
        part: torch.Tensor, group: Any, output_split_sizes: Any = None, *rest: Any
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(part, group, output_split_sizes, *rest)
        padded = _padded(part, max(output_split_sizes))
        whole = padded.new_empty(group.size() * padded.shape[0], *padded.shape[1:])
        torch.distributed.all_gather_into_tensor(whole, padded, group=group)
        parts = zip(whole.chunk(group.size()), output_split_sizes, strict=True)
        return torch.cat([x[:size] for x, size in parts])

    @functools.wraps(reduce_scatter)
    def reduce_scatter_along_first_dim(
        whole: torch.Tensor, group: Any, input_split_sizes: Any = None, *rest: Any
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(whole, group, input_split_sizes, *rest)
        most = max(input_split_sizes)
        parts = torch.stack([_padded(x, most) for x in whole.split(list(input_split_sizes))])
        mine = parts.new_empty(parts.shape[1:])
        torch.distributed.reduce_scatter_tensor(mine, parts.flatten(0, 1), group=group)
        return mine[: input_split_sizes[group.rank()]]

    replace(mappings + "_gather_along_first_dim", gather_along_first_dim)
    replace(mappings + "_reduce_scatter_along_first_dim", reduce_scatter_along_first_dim)


def _padded(part: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([part, part.new_zeros(int(rows) - part.shape[0], *part.shape[1:])])


def allow_trainer_without_cuda() -> None:
    """Pass the ``allow_no_cuda`` that ``initialize_megatron`` has and ``pretrain`` never passes.

    megatron/training/training.py holds the function under its own name.
    """
    original = require("megatron.training.initialize:initialize_megatron")

    @functools.wraps(original)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "allow_no_cuda": True})

    replace("megatron.training.training:initialize_megatron", initialize_megatron)
