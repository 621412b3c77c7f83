"""fc and the norms in front of it: from what the base gives to the draft's hidden."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.checkpoint.sharded_tensors import sharded_tensors
from megatron_eagle.compat import (
    MegatronModule,
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    set_tensor_model_parallel_attributes,
)
from megatron_eagle.platform.cpu.products import linear


class FeatureProjection(MegatronModule):
    """``fc``: inputs [S', B, N] to the draft's hidden [S', B, H], no bias.

    Without sequence parallelism its rows are sharded over TP and the output is gathered (one
    all-gather, none in backward); what needs a gradient must come through
    :meth:`summing_gradient`. With it, tokens are already sharded, so the weight is replicated,
    nothing is sent, and its gradient is summed over TP with the other sequence-parallel weights.
    """

    def __init__(self, config: Any, input_size: int, tp_group: Any) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.sharded = tp_group.size() > 1 and not config.sequence_parallel
        rows = config.hidden_size // tp_group.size() if self.sharded else config.hidden_size
        self.weight = empty_parameter(config, rows, input_size)
        set_tensor_model_parallel_attributes(self.weight, self.sharded, 0, 1)
        with get_cuda_rng_tracker().fork() if self.sharded else nullcontext():
            config.init_method(self.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = linear(inputs, self.weight)
        if self.sharded:
            return gather_from_tensor_model_parallel_region(hidden, group=self.tp_group)
        return hidden

    def summing_gradient(self, x: Tensor) -> Tensor:
        """x, equal on all ranks, on its way into the product: sharded rows give each rank a part of
        its gradient. One all-reduce in backward where rows are sharded, else nothing."""
        if not self.sharded:
            return x
        return copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def scale_blocks(self, scales: Tensor) -> None:
        """Multiply the columns of captured layer a by ``scales[a]``, in place."""
        with torch.no_grad():
            self.weight.view(self.weight.shape[0], scales.numel(), -1).mul_(scales.view(1, -1, 1))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        tensors, axes = {"weight": self.weight}, {"weight": 0} if self.sharded else {}
        return sharded_tensors(tensors, axes, self.tp_group, prefix, sharded_offsets, metadata)


class NormWeight(MegatronModule):
    """The weight [N] of an RMSNorm of captured layers. Calling the module gives it: an overlapped
    parameter gather waits in the call for the bucket that holds the weight."""

    def __init__(self, config: Any, size: int) -> None:
        super().__init__(config=config)
        self.weight = empty_parameter(config, size)
        torch.nn.init.ones_(self.weight)

    def forward(self) -> Tensor:
        return self.weight


class MaskHidden(MegatronModule):
    """P-EAGLE's learned stand-in [1, A * H] for captured layers that are not there yet. Calling the
    module gives it, see :class:`NormWeight`."""

    def __init__(self, config: Any, size: int) -> None:
        super().__init__(config=config)
        self.weight = empty_parameter(config, 1, size)
        config.init_method(self.weight)

    def forward(self) -> Tensor:
        return self.weight


def norm_features(
    features: Tensor, weights: Sequence[Tensor], eps: float, fc: FeatureProjection
) -> Tensor:
    """RMSNorm of each of ``len(weights)`` equal blocks of features [S', B, A * H], for ``fc``.

    No collective in forward; in backward that of :meth:`FeatureProjection.summing_gradient` for the
    weights alone, [A * H] numbers. The features must not need a gradient.
    """
    assert not features.requires_grad
    joined = fc.summing_gradient(torch.cat(list(weights)))
    blocks = features.unflatten(-1, (len(weights), -1))
    normed = torch.nn.functional.rms_norm(blocks, blocks.shape[-1:], eps=eps)
    return normed.flatten(-2) * joined


def empty_parameter(config: Any, *sizes: int) -> torch.nn.Parameter:
    """Empty, and marked so that sequence parallelism sums its gradient over TP."""
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    parameter = torch.nn.Parameter(torch.empty(*sizes, dtype=config.params_dtype, device=device))
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter
