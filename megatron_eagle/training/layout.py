"""Refuse a parallel layout that cannot work, before Megatron's own parser and any process group.

Megatron asserts on most of these too, but only on some ranks, later, and without naming the flag.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from megatron_eagle.checkpoint.base_fields import cut_sizes
from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.checkpoint.hybrid_pattern import CUT, megatron_layers
from megatron_eagle.config import EagleConfig
from megatron_eagle.config.option import flag_name
from megatron_eagle.config.widths import TP_WIDTHS, layer_widths
from megatron_eagle.errors import UserError
from megatron_eagle.training.hybrid_flags import check_recurrent, run_pattern

_UNEVEN_FLAGS = ("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers")


def check_layout(argv: Sequence[str], base: BaseInfo, options: EagleConfig) -> None:
    """Raise ``UserError`` naming the flag if the layout in ``argv`` does not fit the number of
    processes, the base, the draft or the sequence length."""
    layout = _layout(argv)
    stages = layout.pipeline_model_parallel_size
    if options.train.offline_features is not None and stages > 1:
        raise UserError(
            f"--pipeline-model-parallel-size {stages}: with --eagle-offline-features there are no "
            "base layers to cut; leave it out, and these ranks are data-parallel"
        )
    _check_pipeline(layout)
    tensor = layout.tensor_model_parallel_size
    check_processes(
        {
            "tensor-model-parallel": tensor,
            "context-parallel": layout.context_parallel_size,
            "pipeline-model-parallel": layout.pipeline_model_parallel_size,
        }
    )
    if options.spec.num_experts is not None:
        _check_experts(layout, base, options)
    sizes = cut_sizes(base.megatron_args)
    for name, size in {**sizes, "hidden_size": base.megatron_args.get("hidden_size", 0)}.items():
        if size % tensor:
            raise UserError(
                f"--tensor-model-parallel-size {tensor} does not divide the base's {name} = {size}"
            )
    for name, width in layer_widths(options.spec, base.megatron_args).items():
        if name in TP_WIDTHS and width % tensor:
            raise UserError(
                f"--tensor-model-parallel-size {tensor} does not divide the draft's "
                f"{name} = {width} ({flag_name(name)})"
            )
    pattern = run_pattern(argv, base, stages)
    _check_layers(layout, megatron_layers(base.megatron_args), pattern or "")
    check_recurrent(layout, base, options)
    _check_base_experts(layout, base.megatron_args.get("num_experts"))
    if layout.seq_length is not None:
        _check_sequence(layout, options)


def check_micro_batches(args: argparse.Namespace) -> None:
    """Raise ``UserError`` unless every pipeline stage has a micro-batch to train on."""
    stages = args.pipeline_model_parallel_size
    smallest = args.rampup_batch_size[0] if args.rampup_batch_size else args.global_batch_size
    count = int(smallest) // (args.micro_batch_size * args.data_parallel_size)
    if count < stages:
        raise UserError(
            f"--pipeline-model-parallel-size {stages} needs as many micro-batches, there are "
            f"{count}: --global-batch-size {smallest} / (--micro-batch-size "
            f"{args.micro_batch_size} times data parallelism {args.data_parallel_size})"
        )


def layout_flags(argv: Sequence[str]) -> list[str]:
    """Return the flags that the layout in ``argv`` implies for Megatron."""
    layout, words = _layout(argv), []
    if layout.pipeline_model_parallel_size > 1:
        # Megatron makes several gradient buckets on the first stage and one on each other; the
        # stages hold replicas of the draft, so their buckets must be alike.
        words += ["--ddp-bucket-size", str(2**62)]
    if layout.expert_model_parallel_size > 1:
        # Sequences of data-parallel ranks differ in length, so they cannot be all-gathered.
        words += ["--moe-token-dispatcher-type", "alltoall"]
    return words


def pipeline_stages(argv: Sequence[str]) -> int:
    """Return the number of pipeline stages in ``argv``."""
    return int(_layout(argv).pipeline_model_parallel_size)


def _check_experts(layout: argparse.Namespace, base: BaseInfo, options: EagleConfig) -> None:
    """Check what Megatron's MoE layers need; a draft's experts are sharded as the base's are."""
    assert options.spec.num_experts is not None
    shown = f"--eagle-num-experts {options.spec.num_experts}"
    if options.spec.method.is_base_module:
        shown = f"--eagle-algorithm {options.spec.algorithm} beside a base with experts"
    if layout.tensor_model_parallel_size > 1 and not layout.sequence_parallel:
        raise UserError(f"{shown} needs --sequence-parallel with tensor parallelism")
    expert_tensor = layout.expert_tensor_parallel_size or base.megatron_args.get(
        "expert_tensor_parallel_size"
    )
    if expert_tensor not in (None, layout.tensor_model_parallel_size):
        raise UserError(
            f"{shown} is not supported with --expert-tensor-parallel-size {expert_tensor} beside "
            f"--tensor-model-parallel-size {layout.tensor_model_parallel_size}"
        )
    if options.spec.num_experts % layout.expert_model_parallel_size:
        raise UserError(
            f"--expert-model-parallel-size {layout.expert_model_parallel_size} does not divide "
            f"{shown}"
        )
    width = options.spec.moe_ffn_hidden_size
    if width is not None and width % layout.tensor_model_parallel_size:
        raise UserError(
            f"--tensor-model-parallel-size {layout.tensor_model_parallel_size} does not divide "
            f"--eagle-moe-ffn-hidden-size {width}"
        )


def _layout(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in ("tensor-model", "context", "pipeline-model", "expert-model"):
        parser.add_argument(f"--{name}-parallel-size", type=int, default=1)
    parser.add_argument("--expert-tensor-parallel-size", type=int)
    parser.add_argument("--moe-token-dispatcher-type")
    for flag in ("--seq-length", *_UNEVEN_FLAGS, "--ddp-bucket-size"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--pipeline-model-parallel-layout")
    parser.add_argument("--sequence-parallel", action="store_true")
    return parser.parse_known_args(argv)[0]


def check_processes(sizes: dict[str, int]) -> None:
    """Raise ``UserError`` naming the flags if the product of ``sizes`` does not divide the number
    of processes. ``sizes`` maps a flag without its ``-size``, as ``context-parallel``."""
    world, product, shown = _processes(), 1, []
    for name, size in sizes.items():
        shown.append(f"--{name}-size {size}")
        product *= size
        if size < 1 or world % product:
            raise UserError(f"{' times '.join(shown)} does not divide the {world} processes")
        if size == 1:
            shown.pop()


def sizes_without_trainer(
    base: BaseInfo,
    *,
    tensor_model_parallel_size: int | None,
    pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int | None = None,
    expert_model_parallel_size: int | None = None,
    expert_tensor_parallel_size: int | None = None,
) -> dict[str, Any]:
    """Return the layout of a command that runs ``base`` without the trainer, as keyword arguments
    of ``cli.process_groups.start``.

    Sizes that are ``None`` are 1, but the tensor-parallel size: all processes that the others
    leave. An expert is shared by ``expert_tensor_parallel_size`` ranks, by default as in the base's
    checkpoint. Raises ``UserError`` naming the flag, before any rank can wait for another.
    """
    tensor, expert_tensor = tensor_model_parallel_size, expert_tensor_parallel_size
    pipeline, context = pipeline_model_parallel_size or 1, context_parallel_size or 1
    expert = expert_model_parallel_size or 1
    if (expert > 1 or expert_tensor) and not base.megatron_args.get("num_experts"):
        raise _no_experts(expert, expert_tensor)
    others = {"pipeline-model-parallel": pipeline, "context-parallel": context}
    if tensor is None:
        check_processes({**others, "expert-model-parallel": expert})
        tensor = _processes() // (pipeline * context * expert)
    check_processes({"tensor-model-parallel": tensor, **others})
    expert_tensor = expert_tensor or base.megatron_args.get("expert_tensor_parallel_size")
    check_processes(
        {
            "expert-model-parallel": expert,
            "expert-tensor-parallel": expert_tensor or tensor,
            "pipeline-model-parallel": pipeline,
        }
    )
    return {
        "tensor_parallel": tensor,
        "pipeline": pipeline,
        "context": context,
        "expert": expert,
        "expert_tensor_parallel": expert_tensor,
    }


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_pipeline(layout: argparse.Namespace) -> None:
    if layout.pipeline_model_parallel_size > 1 and layout.ddp_bucket_size is not None:
        raise UserError(
            f"--ddp-bucket-size {layout.ddp_bucket_size}: with --pipeline-model-parallel-size "
            f"{layout.pipeline_model_parallel_size} the draft's gradients are one bucket"
        )


def _check_layers(layout: argparse.Namespace, layers: int, pattern: str) -> None:
    """Check that the layers left by the flags of the first and last stage are divided evenly.

    The ``pattern`` of a HybridModel may cut the stages itself, and knows no layout.
    """
    stages = layout.pipeline_model_parallel_size
    if pattern and layout.pipeline_model_parallel_layout is not None:
        raise UserError(
            "--pipeline-model-parallel-layout: a HybridModel is cut by | in --hybrid-layer-pattern"
        )
    if stages == 1 or layout.pipeline_model_parallel_layout is not None:
        return
    fixed = [value for flag in _UNEVEN_FLAGS if (value := _value(layout, flag)) is not None]
    if CUT in pattern:
        if fixed:
            raise UserError(
                f"{' and '.join(_UNEVEN_FLAGS)}: the base's stages are cut by its pattern {pattern}"
            )
        return
    rest, over = layers - sum(fixed), stages - len(fixed)
    if rest < over or (over and rest % over) or (not over and rest):
        other = "| in --hybrid-layer-pattern" if pattern else "--pipeline-model-parallel-layout"
        raise UserError(
            f"--pipeline-model-parallel-size {stages} does not divide the base's {layers} layers; "
            f"give {' and '.join(_UNEVEN_FLAGS)}, or {other}"
        )


def _check_base_experts(layout: argparse.Namespace, experts: int | None) -> None:
    size, tensor = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    if size == 1 and tensor is None:
        return
    if experts is None:
        raise _no_experts(size, tensor)
    if experts % size:
        raise UserError(
            f"--expert-model-parallel-size {size} does not divide the base's {experts} experts"
        )
    if size > 1 and layout.moe_token_dispatcher_type == "allgather":
        raise UserError(
            "--moe-token-dispatcher-type allgather: with --expert-model-parallel-size "
            f"{size} micro-batches differ in length, use alltoall"
        )
    check_processes(
        {
            "expert-model-parallel": size,
            "expert-tensor-parallel": tensor or layout.tensor_model_parallel_size,
            "pipeline-model-parallel": layout.pipeline_model_parallel_size,
        }
    )


def _no_experts(size: int, tensor: int | None) -> UserError:
    flag = f"--expert-tensor-parallel-size {tensor}"
    if size > 1:
        flag = f"--expert-model-parallel-size {size}"
    return UserError(f"{flag}: the base has no experts")


def _value(layout: argparse.Namespace, flag: str) -> int | None:
    return getattr(layout, flag.removeprefix("--").replace("-", "_"))


def _check_sequence(layout: argparse.Namespace, options: EagleConfig) -> None:
    context = layout.context_parallel_size
    pieces = 2 * context if context > 1 else 1
    parts = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    if layout.seq_length % (pieces * parts):
        why = [f"2 * --context-parallel-size {context}"] if context > 1 else []
        why += [f"--tensor-model-parallel-size {parts}"] if parts > 1 else []
        raise UserError(
            f"--seq-length {layout.seq_length} is not a multiple of {pieces * parts} "
            f"({' times '.join(why)})"
        )
    blocks, steps = options.spec.method.drafts_blocks, options.steps
    if context > 1 and layout.seq_length // pieces < steps:
        flag = (
            f"--eagle-block-size {options.spec.slots}" if blocks else f"--eagle-ttt-steps {steps}"
        )
        raise UserError(
            f"--context-parallel-size {context} cuts --seq-length {layout.seq_length} into pieces "
            f"of {layout.seq_length // pieces} tokens, fewer than {flag}"
        )
