"""Run Megatron's linear layers with the fastest products that the processor has.

megatron/core/tensor_parallel/layers.py multiplies with ``torch.matmul``; ``products`` says why that
is slow on some processors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.compat import patch_all, require
from megatron_eagle.platform.cpu.kernel_choice import onednn_is_faster
from megatron_eagle.platform.cpu.products import linear

_LAYERS = "megatron.core.tensor_parallel.layers"
_EXPORTED = "megatron.core.tensor_parallel:linear_with_grad_accumulation_and_async_allreduce"


def speed_up_linears() -> None:
    """Replace the products of column- and row-parallel linears where another kernel is faster.

    Only the plain cases: fp32, and no sequence parallelism. The input's gradient is reduced over
    the tensor-parallel ranks exactly where Megatron reduces it.
    """
    if not onednn_is_faster():
        return
    trained, frozen = (
        f"{_LAYERS}:{name}"
        for name in (
            "linear_with_grad_accumulation_and_async_allreduce",
            "linear_with_frozen_weight",
        )
    )
    fast = _fast_linear(require(trained))
    replacements = {trained: fast, _EXPORTED: fast, frozen: _fast_linear(require(frozen))}
    patch_all(replacements, "fp32 products by oneDNN")


def _fast_linear(original: Any) -> Any:
    """Wrap one of Megatron's linear functions; cases that are not plain still go to it."""
    copy_to_region = require(
        "megatron.core.tensor_parallel.mappings:copy_to_tensor_model_parallel_region"
    )

    def run(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        plain = input.dtype == torch.float32 and not (
            gradient_accumulation_fusion or sequence_parallel or kwargs.get("grad_output_buffer")
        )
        group = kwargs.get("tp_group")
        if not plain or args or (allreduce_dgrad and group is None):
            return original(
                input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad,
                sequence_parallel, *args, **kwargs,
            )  # fmt: skip
        if allreduce_dgrad:
            input = copy_to_region(input, group=group)
        output = linear(input, weight)
        return output if bias is None else output + bias

    run.warned = True  # type: ignore[attr-defined]  # the original keeps this flag on itself
    return run
