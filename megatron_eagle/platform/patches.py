"""Patch what Megatron needs on every device: one small function for each obstacle.

``apply`` is called by ``megatron_eagle.platform.enable``. Each function says what upstream does,
and becomes unnecessary when upstream changes that.
"""

from __future__ import annotations

import copy
import functools
import os
import queue
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.checkpoint.safe_reading import read_checkpoints_safely
from megatron_eagle.compat import patch, patch_all, require
from megatron_eagle.platform.adam import FusedAdam


def apply() -> None:
    """Set two environment variables and make the patches of this module."""
    # validate_args insists on it for tensor, sequence and context parallelism.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Micro-batches differ in length: blocks of ever new sizes would fragment the memory. Read when
    # the allocator is first used.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    skip_helper_build_without_makefile()
    allow_sequence_parallel_torch_norm()
    use_checkpointable_adam()
    load_optimizer_state_without_grad()
    save_without_a_manager_process()
    read_checkpoints_safely()


def skip_helper_build_without_makefile() -> None:
    """Do not run ``make`` where there is nothing to make.

    The wheel ships ``helpers_cpp`` compiled, without its Makefile; megatron/training/initialize.py
    runs ``make`` regardless and exits when it fails (megatron/core/datasets/utils.py).
    """
    path = "megatron.core.datasets.utils:compile_helpers"
    require(path)
    source = require("megatron.core.datasets.utils:__file__")
    if not Path(source).with_name("Makefile").exists():
        require("megatron.core.datasets.helpers_cpp:build_blending_indices")
        patch(path, lambda: None, "the wheel has compiled helpers and no Makefile")


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

    patch(path, staticmethod(new), "torch norms under sequence parallelism")


def use_checkpointable_adam() -> None:
    """Give Megatron ``FusedAdam`` unless Transformer Engine or Apex already provides one.

    With ``torch.optim.AdamW`` a checkpoint of the distributed optimizer cannot be loaded again
    (megatron/core/optimizer/distrib_optimizer.py: the assert on one common step in ``state_dict``
    fails on a fresh optimizer, and the sharded state has no ``step``).
    """
    distributed = "megatron.core.optimizer.distrib_optimizer"
    if require(f"{distributed}:HAVE_APEX_OR_TE"):
        return
    patch_all(
        {
            "megatron.core.optimizer:Adam": FusedAdam,
            "megatron.core.optimizer:USING_PYTORCH_OPTIMIZER": False,
            f"{distributed}:Adam": FusedAdam,
            f"{distributed}:HAVE_APEX_OR_TE": True,
            f"{distributed}:USING_APEX_OPTIMIZER": True,
        },
        "an Adam whose state can be loaded again",
    )


def load_optimizer_state_without_grad() -> None:
    """Load an fp32 distributed optimizer in place, which autograd forbids outside ``no_grad``.

    megatron/core/optimizer/distrib_optimizer.py decorates the other loaders and misses this one.
    """
    path = (
        "megatron.core.optimizer.distrib_optimizer:"
        "DistributedOptimizer.load_parameter_state_from_dp_reshardable"
    )
    patch(path, torch.no_grad()(require(path)), "loading in place needs no_grad")


def save_without_a_manager_process() -> None:
    """Let the writers of a synchronous save, which are threads, report through a plain queue.

    megatron/core/dist_checkpointing/strategies/filesystem_async.py starts a process on every rank
    for that queue. Only asynchronous saves need it, and it imports the main script anew.
    """
    strategies = "megatron.core.dist_checkpointing.strategies"
    path = f"{strategies}.torch:TorchDistSaveShardedStrategy.save"
    original = require(path)
    require(f"{strategies}.filesystem_async:get_write_results_queue")
    writer: Any = sys.modules[f"{strategies}.filesystem_async"]

    @functools.wraps(original)
    def save(*args: Any, **kwargs: Any) -> Any:
        shared, writer._results_queue = writer._results_queue, queue.Queue()
        try:
            return original(*args, **kwargs)
        finally:
            writer._results_queue = shared

    patch(path, save, "a synchronous save starts no process")
