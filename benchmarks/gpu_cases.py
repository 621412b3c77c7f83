"""What ``benchmarks/gpu.py`` measures: cases, and implementations of a step.

Only PyTorch and the megatron-core wheel are needed; Transformer Engine's layers are measured where
it is installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.draft_step import DraftStep, build
from benchmarks.plain_modelopt import PlainModelOpt
from benchmarks.problem import Problem

LLAMA_1B = Problem(
    hidden=2048, intermediate=8192, heads=32, kv_heads=8, vocab=128256, draft_vocab=128256,
    seq=2048, batch=16, ttt=3, dtype="bf16",
)  # fmt: skip
SMALL = Problem(
    hidden=256, intermediate=512, heads=4, kv_heads=2, vocab=1000, draft_vocab=600, seq=128,
    batch=2, ttt=3, dtype="bf16",
)  # fmt: skip
TINY = dataclasses.replace(SMALL, hidden=64, intermediate=128, seq=32)
DOCUMENTS = 16

Run = tuple[Callable[[], Tensor], list[Tensor]]
"""The forward pass of a step, and the tensors at rest."""


def cases_of(problem: Problem) -> dict[str, Problem]:
    """Return the cases of a day: vocabularies of base and draft, half the tokens masked, packed."""
    small = min(32000, problem.vocab // 4)
    documents = min(DOCUMENTS, problem.seq // 8)
    return {
        "whole vocabulary": problem,
        "small draft vocabulary": dataclasses.replace(problem, draft_vocab=small),
        "small vocabularies": dataclasses.replace(problem, vocab=small, draft_vocab=small),
        "half masked": dataclasses.replace(problem, draft_vocab=small, mask_fraction=0.5),
        "packed documents": dataclasses.replace(problem, draft_vocab=small, documents=documents),
    }


def has_transformer_engine() -> bool:
    """Return whether Megatron finds Transformer Engine."""
    from megatron_eagle.training.implied_flags import has_transformer_engine as found

    return found()


def implementations(problem: Problem, device: str) -> dict[str, Callable[[], Run]]:
    """Return what can run ``problem``, by name; each is built when it is called.

    ModelOpt's mathematics do not keep packed documents apart: they are left out there.
    """
    ours = partial(_ours, problem, device)
    found: dict[str, Callable[[], Run]] = {
        "ours": ours,
        "ours, head gradient added up by Megatron's DDP": partial(ours, in_ddp=True),
        "ours, eager passes": partial(ours, kernels="eager"),
        "ours, chunks of 512 MiB": partial(ours, loss_chunk_mib=512),
        "ours, compiled": partial(ours, compiled=True),
    }
    if has_transformer_engine():
        found["ours, Transformer Engine's layers"] = partial(ours, layers="transformer_engine")
    if problem.documents > 1:
        return {**found, "ours, kernels for each document": partial(ours, one_launch=False)}
    plain = partial(_plain, problem, device)
    return {
        **found,
        "plain ModelOpt before": partial(plain, before=True),
        "plain ModelOpt after": partial(plain, before=False),
        "plain ModelOpt compiled": partial(plain, before=False, compiled=True),
    }


def _ours(
    problem: Problem,
    device: str,
    *,
    compiled: bool = False,
    kernels: str = "auto",
    in_ddp: bool = False,
    one_launch: bool = True,
    **options: Any,
) -> Run:
    from megatron_eagle.kernels.choice import choose_kernels
    from megatron_eagle.platform.compiler import compile_regions

    compile_regions(compiled)
    choose_kernels(kernels)
    step, resting = build(problem, device, options)
    forward = in_megatron_ddp(step) if in_ddp else step
    return (forward if one_launch else partial(_by_document, forward)), resting


def _by_document(forward: Callable[[], Tensor]) -> Tensor:
    """Run ``forward`` with kernels for each document and run of live rows."""
    from megatron_eagle.attention import varlen

    with mock.patch.object(varlen, "applies", lambda q: False):
        return forward()


def in_megatron_ddp(step: DraftStep) -> Callable[[], Tensor]:
    """Return ``step`` in Megatron's DistributedDataParallel, as training runs it: gradients are
    added up in fp32 buffers, and the schedule's function divides the loss."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    model: Any = step.model
    model.config.grad_scale_func = lambda loss: loss / step.rows
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(model.config, config, model)
    return lambda: model.config.grad_scale_func(wrapped(step.batch)[0])


def _plain(problem: Problem, device: str, *, before: bool, compiled: bool = False) -> Run:
    baseline = PlainModelOpt(problem, device, before, compiled)
    return baseline, baseline.resting


def device_name(device: str) -> str:
    """Return what the report calls the device."""
    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)
