"""Refusing a parallel layout that cannot work, before Megatron's own parser and before any group.

Megatron asserts on most of these too, some ranks into the run and without naming the flag.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from megatron_eagle.checkpoint_dir import BaseInfo
from megatron_eagle.config import EagleConfig
from megatron_eagle.config_checks import flag_name


def check_layout(user: Sequence[str], base: BaseInfo, options: EagleConfig) -> None:
    """Raise ``ValueError`` naming the flag if the layout in ``user`` does not fit the number of
    processes, the base or the sequence length."""
    given = _layout(user)
    tensor, context = given.tensor_model_parallel_size, given.context_parallel_size
    _check_processes({"tensor-model-parallel": tensor, "context-parallel": context})
    for name, width in options.layer_widths(base.megatron_args).items():
        if name != "kv_channels" and width % tensor:
            raise ValueError(
                f"--tensor-model-parallel-size {tensor} does not divide the draft's "
                f"{name} = {width} ({flag_name(name)})"
            )
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "hidden_size"):
        if base.megatron_args[name] % tensor:
            raise ValueError(
                f"--tensor-model-parallel-size {tensor} does not divide "
                f"the base's {name} = {base.megatron_args[name]}"
            )
    if given.seq_length is not None:
        _check_sequence(given, options.ttt_steps)


def _layout(user: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in ("tensor-model-parallel", "context-parallel"):
        parser.add_argument(f"--{name}-size", type=int, default=1)
    parser.add_argument("--seq-length", type=int)
    parser.add_argument("--sequence-parallel", action="store_true")
    return parser.parse_known_args(user)[0]


def _check_processes(sizes: dict[str, int]) -> None:
    world, product, shown = int(os.environ.get("WORLD_SIZE", "1")), 1, []
    for name, size in sizes.items():
        shown.append(f"--{name}-size {size}")
        product *= size
        if size < 1 or world % product:
            raise ValueError(f"{' times '.join(shown)} does not divide the {world} processes")
        if size == 1:
            shown.pop()


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
