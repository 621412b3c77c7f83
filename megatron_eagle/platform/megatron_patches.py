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


def allow_trainer_without_cuda() -> None:
    """Pass the ``allow_no_cuda`` that ``initialize_megatron`` has and ``pretrain`` never passes.

    megatron/training/training.py holds the function under its own name.
    """
    original = require("megatron.training.initialize:initialize_megatron")

    @functools.wraps(original)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "allow_no_cuda": True})

    replace("megatron.training.training:initialize_megatron", initialize_megatron)
