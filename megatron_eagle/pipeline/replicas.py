"""One draft on several pipeline stages: replicas that start equal and stay bit-equal.

To the draft, pipeline stages are more data-parallel ranks. Megatron's DDP sums its gradients over
data- and context-parallel ranks; what is left is one more sum over the pipeline group, a gradient
norm that counts every parameter once, and a checkpoint that holds it once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.compat import finalize_model_grads


def equal_start(draft: torch.nn.Module, group: ProcessGroup) -> None:
    """Give every stage the first one's parameters and mark those of the others as shared, so that
    Megatron's gradient norm counts the first one's alone. A collective of the pipeline group."""
    for parameter in draft.parameters():
        torch.distributed.broadcast(parameter.data, group=group, group_src=0)
        parameter.shared = group.rank() > 0  # type: ignore[attr-defined]


def as_replica(sharded: dict[str, Any], stage: int) -> dict[str, Any]:
    """The sharded state dict with every entry marked as a copy of stage 0's, in place."""
    for value in sharded.values():
        if isinstance(value, dict):
            as_replica(value, stage)
        else:
            first, *rest = value.replica_id
            value.replica_id = (first + stage, *rest)
    return sharded


class FinalizeReplicas:
    """Megatron's ``finalize_model_grads_func`` for replicas over the pipeline group.

    After Megatron's own (sum over data- and context-parallel ranks, division by the rows of all
    stages), one all-reduce per DDP bucket over the pipeline group: of the whole bucket, or with the
    distributed optimizer of this rank's shard.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._checked = False

    def __call__(self, model: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
        assert num_tokens is not None, "--calculate-per-token-loss"
        torch.distributed.all_reduce(num_tokens, group=self.group)
        finalize_model_grads(model, num_tokens, **options)
        gradients = [g for chunk in model for g in _reduced(chunk, options)]
        if not self._checked:
            self._check_layout(gradients)
        for gradient in gradients:
            torch.distributed.all_reduce(gradient, group=self.group)

    def __deepcopy__(self, memo: Any) -> FinalizeReplicas:
        """Megatron copies the config that holds this; a process group has no copies."""
        return self

    def _check_layout(self, gradients: list[Tensor]) -> None:
        mine = [gradient.numel() for gradient in gradients]
        others: list[Any] = [None] * self.group.size()
        torch.distributed.all_gather_object(others, mine, group=self.group)
        assert all(other == mine for other in others), f"gradient buckets differ: {others}"
        self._checked = True


def _reduced(chunk: Any, options: dict[str, Any]) -> list[Tensor]:
    """The parts of a DDP model's gradient buckets that are complete on this rank."""
    config = chunk.ddp_config
    found = []
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        if not config.use_distributed_optimizer or options.get("force_all_reduce"):
            found.append(buffer.grad_data)
            continue
        group = buffer.data_parallel_group
        found += [b.grad_data.chunk(group.size())[group.rank()] for b in buffer.buckets]
    return found
