"""Parse the training command line: Megatron's flags, ``--eagle-*`` flags, and implied ones.

The base's checkpoint says its dimensions. Their flags are put in front of the user's, and a flag of
the user's that contradicts them is an error. ``implied_flags`` chooses what else the user left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron.training.arguments import (
    core_transformer_config_from_args,
    parse_and_validate_args,
)

from megatron_eagle.checkpoint.base_description import read_base
from megatron_eagle.checkpoint.base_fields import check_complete
from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.checkpoint.hybrid_pattern import megatron_layers
from megatron_eagle.config import EagleConfig
from megatron_eagle.config.flags import add_eagle_flags
from megatron_eagle.errors import UserError, literal
from megatron_eagle.hf.base.megatron_args import ABSENT
from megatron_eagle.platform import is_enabled
from megatron_eagle.teacher.description import STORED_AS
from megatron_eagle.training.base_start import check_base_start
from megatron_eagle.training.flag_table.check import CommandLine, check_flags
from megatron_eagle.training.flag_table.conditions import check_conditions
from megatron_eagle.training.frozen_config import frozen_config
from megatron_eagle.training.implied_flags import (
    implied_flags,
    layer_implementation,
    overriding_flags,
    tell,
)
from megatron_eagle.training.layout import check_layout, check_micro_batches
from megatron_eagle.training.megatron_flags import megatron_flags
from megatron_eagle.training.megatron_refusals import check_save, in_one_line
from megatron_eagle.user_files import naming

RECOMPUTABLE = ("core_attn", "mlp")
"""``--recompute-modules`` that the draft's layers support. The first layer's norm returns its
residual too, which Megatron's checkpointing of norms does not expect."""


def parse_eagle_args(
    options: EagleConfig, argv: Sequence[str]
) -> tuple[argparse.Namespace, BaseInfo]:
    """Return Megatron's args and the base's description for the user's flags ``argv``.

    Megatron's parser reads ``sys.argv``, which is replaced by the implied flags and ``argv``.
    Raises ``UserError`` naming the flag for a mistake that every rank sees alike.
    """
    base = _base_info(options)
    line = CommandLine.parse(argv)
    notes = check_flags(line, megatron_flags(base.megatron_args))
    check_save(argv)
    check_layout(argv, base, options)
    check_base_start(options, base)
    layers = layer_implementation(argv)
    notes += check_conditions(line, options, layers, on_gpu=not is_enabled())
    for text in notes:
        tell(text)
    sys.argv[1:] = [*implied_flags(base, options, argv, layers), *argv, *overriding_flags(options)]
    args = in_one_line(parse_and_validate_args, extra_args_provider=add_eagle_flags)
    _check_dimensions(args, base)
    frozen_config(core_transformer_config_from_args(args), base)
    _check_recompute(args, options)
    _check_throughput(args, options)
    check_micro_batches(args)
    own_layers = base.megatron_args["num_layers"]
    options.check_against_base(own_layers, base.vocab_size, args.seq_length)
    return args, base


def show_help() -> NoReturn:
    """Print Megatron's flags and the ``--eagle-*`` flags as ``sys.argv`` asks, and exit."""
    parse_and_validate_args(extra_args_provider=_add_flags_with_printable_help)
    raise AssertionError("sys.argv does not ask for help")


def _add_flags_with_printable_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--eagle-*`` flags, and escape the bare % in a help text of Megatron 0.19.2, on
    which argparse fails."""
    for action in parser._actions:
        try:
            _ = (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")
    return add_eagle_flags(parser)


def _base_info(options: EagleConfig) -> BaseInfo:
    directory = options.train.base_checkpoint
    assert directory is not None
    with naming("base_checkpoint"):
        base = read_base(directory, options.train.base_description)
    check_complete(base.megatron_args, f"<base_checkpoint> {literal(directory)}")
    return base


def _check_recompute(args: argparse.Namespace, options: EagleConfig) -> None:
    """Check what the draft's layers can recompute; the base keeps no activations at all."""
    for module in args.recompute_modules or ():
        if args.recompute_granularity is not None and module not in RECOMPUTABLE:
            raise UserError(
                f"--recompute-modules {module} is not supported, only {' and '.join(RECOMPUTABLE)}"
            )
        experts = options.spec.num_experts
        if module == "mlp" and args.recompute_granularity is not None and experts:
            raise UserError(
                f"--recompute-modules mlp: a draft of --eagle-num-experts {experts} "
                "has none, and experts are not recomputed"
            )


def _check_throughput(args: argparse.Namespace, options: EagleConfig) -> None:
    if args.log_throughput and options.spec.method.drafts_blocks:
        raise UserError(
            f"--log-throughput: the operations of --eagle-algorithm {options.spec.algorithm} are "
            "not counted"
        )


def _check_dimensions(args: argparse.Namespace, base: BaseInfo) -> None:
    for name, value in {**ABSENT, **base.megatron_args}.items():
        if name in ("vocab_size", "max_position_embeddings", "make_vocab_size_divisible_by"):
            continue
        if name == "hybrid_layer_pattern":
            continue  # compared with its cuts, ``hybrid_flags.run_pattern``
        if name == "num_layers":
            value = megatron_layers(base.megatron_args)
        parsed = getattr(args, STORED_AS.get(name, name), None)
        parsed = list(parsed) if isinstance(parsed, tuple) else parsed
        if parsed != value:
            raise UserError(
                f"{_flag(name)} {parsed} contradicts the base checkpoint, which has "
                f"{name} = {value}"
            )
    longest = base.megatron_args["max_position_embeddings"]
    if args.seq_length > longest:
        raise UserError(f"--seq-length {args.seq_length} exceeds the base's {longest} positions")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
