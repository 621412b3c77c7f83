"""Make the process groups of a command that runs without the trainer."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


def start(
    seed: int,
    tensor_parallel: int | None = None,
    expert_tensor_parallel: int | None = None,
    *,
    pipeline: int = 1,
    context: int = 1,
    expert: int = 1,
) -> Any:
    """Return Megatron's process groups, and seed its random generators. A collective of all ranks.

    The ranks are those of torchrun's environment, or this process alone. ``tensor_parallel`` is by
    default the number of ranks that the other sizes leave; with a smaller one, the tensor-parallel
    groups are data-parallel to each other. ``expert_tensor_parallel`` ranks share an expert, by
    default as many as ``tensor_parallel``. Call ``megatron_eagle.platform.enable`` before.
    """
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["MASTER_PORT"] = str(_free_port())
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    remaining = torch.distributed.get_world_size() // (pipeline * context * expert)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel or remaining,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor_parallel,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
