"""One draft on several pipeline stages: replicas that start equal and stay bit-equal.

To the draft, pipeline stages are further data-parallel ranks. Megatron's DDP sums its gradients
over data- and context-parallel ranks; this module adds one more sum over the pipeline group, a
gradient norm that counts every parameter once, and a checkpoint that holds it once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.compat import finalize_model_grads


def equal_start(draft: torch.nn.Module, group: ProcessGroup) -> None:
    """Give every stage the first stage's parameters, and mark the other stages' as shared, so that
    Megatron's gradient norm counts the first stage's alone. One broadcast per parameter over the
    pipeline ``group``."""
    for parameter in draft.parameters():
        torch.distributed.broadcast(parameter.data, group=group, group_src=0)
        parameter.shared = group.rank() > 0  # type: ignore[attr-defined]


def as_replica(sharded: dict[str, Any], stage: int) -> dict[str, Any]:
    """Mark every entry of the sharded state dict as a copy of stage 0's, in place; return it."""
    for value in sharded.values():
        if isinstance(value, dict):
            as_replica(value, stage)
        else:
            first, *rest = value.replica_id
            value.replica_id = (first + stage, *rest)
    return sharded


class FinalizeReplicas:
    """Megatron's ``finalize_model_grads_func`` for replicas over the pipeline group.

    After Megatron's own function (sum over data- and context-parallel ranks, division by the
    supervised tokens of all stages), one all-reduce per DDP bucket over the pipeline group: of the
    whole bucket, or with the distributed optimizer of this rank's shard.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._checked = False

    def __call__(self, model: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
        assert num_tokens is not None, "calculate_per_token_loss is off"
        torch.distributed.all_reduce(num_tokens, group=self.group)
        finalize_model_grads(model, num_tokens, **options)
        gradients = [g for chunk in model for g in _reduced(chunk, options)]
        if not self._checked:
            self._check_layout(gradients)
        for gradient in gradients:
            torch.distributed.all_reduce(gradient, group=self.group)

    def __deepcopy__(self, memo: Any) -> FinalizeReplicas:
        """Return this very object: Megatron copies the config that holds it, and a process group
        cannot be copied."""
        return self

    def _check_layout(self, gradients: list[Tensor]) -> None:
        sizes = [gradient.numel() for gradient in gradients]
        by_stage: list[Any] = [None] * self.group.size()
        torch.distributed.all_gather_object(by_stage, sizes, group=self.group)
        assert all(other == sizes for other in by_stage), f"gradient buckets differ: {by_stage}"
        self._checked = True


def _reduced(chunk: Any, options: dict[str, Any]) -> list[Tensor]:
    """Return the parts of a DDP model's gradient buckets that are complete on this rank."""
    config = chunk.ddp_config
    reduced = []
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        if not config.use_distributed_optimizer or options.get("force_all_reduce"):
            reduced.append(buffer.grad_data)
            continue
        group = buffer.data_parallel_group
        reduced += [b.grad_data.chunk(group.size())[group.rank()] for b in buffer.buckets]
    return reduced
