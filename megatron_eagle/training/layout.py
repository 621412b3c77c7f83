"""Refusing a parallel layout that cannot work, before Megatron's own parser and before any group.

Megatron asserts on most of these too, some ranks into the run and without naming the flag.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.config import EagleConfig
from megatron_eagle.config.option import flag_name
from megatron_eagle.config.widths import TP_WIDTHS, layer_widths

_VIRTUAL_FLAGS = (
    "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank",
)
_UNEVEN_FLAGS = ("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers")


def check_layout(user: Sequence[str], base: BaseInfo, options: EagleConfig) -> None:
    """Raise ``ValueError`` naming the flag if the layout in ``user`` does not fit the number of
    processes, the base or the sequence length."""
    given = _layout(user)
    stages = given.pipeline_model_parallel_size
    if options.train.offline_features is not None and stages > 1:
        raise ValueError(
            f"--pipeline-model-parallel-size {stages}: with --eagle-offline-features there are no "
            "base layers to cut; leave it out, and these ranks are data-parallel"
        )
    _check_pipeline(given)
    tensor = given.tensor_model_parallel_size
    check_processes(
        {
            "tensor-model-parallel": tensor,
            "context-parallel": given.context_parallel_size,
            "pipeline-model-parallel": given.pipeline_model_parallel_size,
        }
    )
    if options.spec.num_experts is not None:
        _check_experts(given, base, options)
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "hidden_size"):
        if base.megatron_args[name] % tensor:
            raise ValueError(
                f"--tensor-model-parallel-size {tensor} does not divide "
                f"the base's {name} = {base.megatron_args[name]}"
            )
    for name, width in layer_widths(options.spec, base.megatron_args).items():
        if name in TP_WIDTHS and width % tensor:
            raise ValueError(
                f"--tensor-model-parallel-size {tensor} does not divide the draft's "
                f"{name} = {width} ({flag_name(name)})"
            )
    _check_layers(given, base.megatron_args["num_layers"])
    _check_base_experts(given, base.megatron_args.get("num_experts"))
    if given.seq_length is not None:
        _check_sequence(given, options.train.ttt_steps)


def check_micro_batches(args: argparse.Namespace) -> None:
    """Every pipeline stage trains on micro-batches of its own, so each needs one."""
    stages = args.pipeline_model_parallel_size
    smallest = args.rampup_batch_size[0] if args.rampup_batch_size else args.global_batch_size
    found = int(smallest) // (args.micro_batch_size * args.data_parallel_size)
    if found < stages:
        raise ValueError(
            f"--pipeline-model-parallel-size {stages} needs as many micro-batches, there are "
            f"{found}: --global-batch-size {smallest} / (--micro-batch-size "
            f"{args.micro_batch_size} times data parallelism {args.data_parallel_size})"
        )


def layout_flags(user: Sequence[str]) -> list[str]:
    """What the layout in ``user`` implies for Megatron."""
    given, words = _layout(user), []
    if given.pipeline_model_parallel_size > 1:
        # Megatron makes several gradient buckets on the first stage and one on all others; of
        # replicas they must be the same.
        words += ["--ddp-bucket-size", str(2**62)]
    if given.expert_model_parallel_size > 1:
        # Data-parallel ranks have sequences of lengths of their own, which a gather cannot join.
        words += ["--moe-token-dispatcher-type", "alltoall"]
    return words


def _check_experts(given: argparse.Namespace, base: BaseInfo, options: EagleConfig) -> None:
    """What Megatron's MoE layers ask for; a draft's experts are cut as the base's."""
    assert options.spec.num_experts is not None
    shown = f"--eagle-num-experts {options.spec.num_experts}"
    if given.tensor_model_parallel_size > 1 and not given.sequence_parallel:
        raise ValueError(f"{shown} needs --sequence-parallel with tensor parallelism")
    expert_tensor = given.expert_tensor_parallel_size or base.megatron_args.get(
        "expert_tensor_parallel_size"
    )
    if expert_tensor not in (None, given.tensor_model_parallel_size):
        raise ValueError(
            f"{shown} is not supported with --expert-tensor-parallel-size {expert_tensor} beside "
            f"--tensor-model-parallel-size {given.tensor_model_parallel_size}"
        )
    if options.spec.num_experts % given.expert_model_parallel_size:
        raise ValueError(
            f"--expert-model-parallel-size {given.expert_model_parallel_size} does not divide "
            f"{shown}"
        )
    width = options.spec.moe_ffn_hidden_size
    if width is not None and width % given.tensor_model_parallel_size:
        raise ValueError(
            f"--tensor-model-parallel-size {given.tensor_model_parallel_size} does not divide "
            f"--eagle-moe-ffn-hidden-size {width}"
        )


def _layout(user: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in ("tensor-model", "context", "pipeline-model", "expert-model"):
        parser.add_argument(f"--{name}-parallel-size", type=int, default=1)
    parser.add_argument("--expert-tensor-parallel-size", type=int)
    parser.add_argument("--moe-token-dispatcher-type")
    for flag in ("--seq-length", *_VIRTUAL_FLAGS, *_UNEVEN_FLAGS, "--ddp-bucket-size"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--pipeline-model-parallel-layout")
    parser.add_argument("--sequence-parallel", action="store_true")
    return parser.parse_known_args(user)[0]


def check_processes(sizes: dict[str, int]) -> None:
    """Raise ``ValueError`` naming the flags if ``sizes``, by flag, do not divide the processes."""
    world, product, shown = int(os.environ.get("WORLD_SIZE", "1")), 1, []
    for name, size in sizes.items():
        shown.append(f"--{name}-size {size}")
        product *= size
        if size < 1 or world % product:
            raise ValueError(f"{' times '.join(shown)} does not divide the {world} processes")
        if size == 1:
            shown.pop()


def _check_pipeline(given: argparse.Namespace) -> None:
    for flag in _VIRTUAL_FLAGS:
        value = _value(given, flag)
        if value is not None:
            raise ValueError(
                f"{flag} {value}: the base only runs forward, so its pipeline has no bubbles that "
                "virtual stages could fill; leave the flag out, checkpoints load without it"
            )
    if given.pipeline_model_parallel_size > 1 and given.ddp_bucket_size is not None:
        raise ValueError(
            f"--ddp-bucket-size {given.ddp_bucket_size}: with --pipeline-model-parallel-size "
            f"{given.pipeline_model_parallel_size} the draft's gradients are one bucket"
        )


def _check_layers(given: argparse.Namespace, layers: int) -> None:
    """Megatron divides the layers evenly, after those that flags give to the first and the last."""
    stages = given.pipeline_model_parallel_size
    if stages == 1 or given.pipeline_model_parallel_layout is not None:
        return
    fixed = [value for flag in _UNEVEN_FLAGS if (value := _value(given, flag)) is not None]
    rest, over = layers - sum(fixed), stages - len(fixed)
    if rest < over or (over and rest % over) or (not over and rest):
        raise ValueError(
            f"--pipeline-model-parallel-size {stages} does not divide the base's {layers} layers; "
            f"give {' and '.join(_UNEVEN_FLAGS)}, or --pipeline-model-parallel-layout"
        )


def _check_base_experts(given: argparse.Namespace, experts: int | None) -> None:
    size, tensor = given.expert_model_parallel_size, given.expert_tensor_parallel_size
    if size == 1 and tensor is None:
        return
    if experts is None:
        flag = f"--expert-model-parallel-size {size}" if size > 1 else (
            f"--expert-tensor-parallel-size {tensor}"
        )  # fmt: skip
        raise ValueError(f"{flag}: the base has no experts")
    if experts % size:
        raise ValueError(
            f"--expert-model-parallel-size {size} does not divide the base's {experts} experts"
        )
    if size > 1 and given.moe_token_dispatcher_type == "allgather":
        raise ValueError(
            "--moe-token-dispatcher-type allgather: with --expert-model-parallel-size "
            f"{size} micro-batches differ in length, use alltoall"
        )
    check_processes(
        {
            "expert-model-parallel": size,
            "expert-tensor-parallel": tensor or given.tensor_model_parallel_size,
            "pipeline-model-parallel": given.pipeline_model_parallel_size,
        }
    )


def _value(given: argparse.Namespace, flag: str) -> int | None:
    return getattr(given, flag.removeprefix("--").replace("-", "_"))


def _check_sequence(given: argparse.Namespace, steps: int) -> None:
    context = given.context_parallel_size
    pieces = 2 * context if context > 1 else 1
    parts = given.tensor_model_parallel_size if given.sequence_parallel else 1
    if given.seq_length % (pieces * parts):
        why = [f"2 * --context-parallel-size {context}"] if context > 1 else []
        why += [f"--tensor-model-parallel-size {parts}"] if parts > 1 else []
        raise ValueError(
            f"--seq-length {given.seq_length} is not a multiple of {pieces * parts} "
            f"({' times '.join(why)})"
        )
    if context > 1 and given.seq_length // pieces < steps:
        raise ValueError(
            f"--context-parallel-size {context} cuts --seq-length {given.seq_length} into pieces "
            f"of {given.seq_length // pieces} tokens, fewer than --eagle-ttt-steps {steps}"
        )
