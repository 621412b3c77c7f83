"""Parse the training command line: Megatron's flags, ``--eagle-*`` flags, and implied ones.

The base's checkpoint says its dimensions. Their flags are put in front of the user's, and a flag of
the user's that contradicts them is an error. On a machine without CUDA, the flags that a CPU needs
are put in front too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

from megatron.training.arguments import parse_and_validate_args

from megatron_eagle.checkpoint.base_fields import check_complete
from megatron_eagle.checkpoint.directory import BaseInfo, load_base_json
from megatron_eagle.config import EagleConfig
from megatron_eagle.config.flags import add_eagle_flags
from megatron_eagle.errors import UserError, literal
from megatron_eagle.hf.base.megatron_args import ABSENT
from megatron_eagle.platform import is_enabled
from megatron_eagle.training.base_start import check_base_start
from megatron_eagle.training.layout import check_layout, check_micro_batches, layout_flags
from megatron_eagle.training.megatron_flags import megatron_flags
from megatron_eagle.training.megatron_refusals import check_megatron_flags, in_one_line, saved_to
from megatron_eagle.training.nan_stop import nan_flags, noted_iterations
from megatron_eagle.user_files import naming

CPU_FLAGS = [
    *("--distributed-backend", "gloo", "--transformer-impl", "local"),
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--disable-jit-fuser",  # compiling Megatron's small fusions takes longer than it saves
]
LOCAL_FLAGS = ["--no-persist-layer-norm", "--no-rope-fusion"]
"""Features that ``--transformer-impl local`` lacks: they need Transformer Engine or Apex."""

ALWAYS_FLAGS = ["--calculate-per-token-loss"]
"""The loss is normalised by one global token count, so Megatron must keep sums."""

_ALIASES = {"norm_epsilon": "layernorm_epsilon"}
"""Flags that Megatron's parser stores under another name."""

_UNSUPPORTED: dict[str, int | bool | None] = {
    "use_torch_fsdp2": False,
    "use_megatron_fsdp": False,
    "mtp_num_layers": None,
    "init_model_with_meta_device": False,
    "reset_position_ids": False,
    "reset_attention_mask": False,
}

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
    base = _base_info(options.train.base_checkpoint)
    _check_supported(argv)
    check_megatron_flags(argv)
    if "--multi-latent-attention" in argv and "multi_latent_attention" not in base.megatron_args:
        raise UserError("--multi-latent-attention contradicts the base checkpoint, which has none")
    check_layout(argv, base, options)
    check_base_start(options, base)
    sys.argv[1:] = [*_implied_flags(base, options, argv), *argv]
    args = in_one_line(parse_and_validate_args, extra_args_provider=add_eagle_flags)
    _check_dimensions(args, base)
    _check_recompute(args, options)
    if options.train.reads_documents and args.eval_iters:
        flag = "train-data" if options.train.offline_features is None else "offline-features"
        raise UserError(f"--eval-iters {args.eval_iters}: --eagle-{flag} has no validation")
    check_micro_batches(args)
    if options.train.pack:
        _check_packing(args)
    options.check_against_base(args.num_layers, base.vocab_size, args.seq_length)
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


def _base_info(directory: str | None) -> BaseInfo:
    assert directory is not None
    with naming("base_checkpoint"):
        base = load_base_json(directory)
    check_complete(base.megatron_args, f"<base_checkpoint> {literal(directory)}")
    return base


def _implied_flags(base: BaseInfo, options: EagleConfig, argv: Sequence[str]) -> list[str]:
    words = [*ALWAYS_FLAGS, *megatron_flags(base.megatron_args)]
    if is_enabled():
        words += CPU_FLAGS
    if is_enabled() or _uses_local_layers(argv):
        words += LOCAL_FLAGS
    if find_spec("fused_weight_gradient_mlp_cuda") is None:  # of Apex
        words += ["--no-gradient-accumulation-fusion"]
    words += layout_flags(argv)
    save, stages = saved_to(argv)
    words += nan_flags(argv, noted_iterations(save), stages)
    if save is not None:
        words.append("--exit-signal-handler")  # SIGTERM, as schedulers send: save, then exit
    if options.train.reads_documents:
        # The data are token ids, without a validation split.
        words += ["--tokenizer-type", "NullTokenizer", "--eval-iters", "0"]
        words += ["--eval-interval", "1000000000"]
    return words


def _uses_local_layers(argv: Sequence[str]) -> bool:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--transformer-impl")
    return parser.parse_known_args(argv)[0].transformer_impl == "local"


def _check_packing(args: argparse.Namespace) -> None:
    """Only local layers use the core attention of this package, which keeps documents apart."""
    if args.transformer_impl != "local":
        raise UserError(f"--eagle-pack needs --transformer-impl local, not {args.transformer_impl}")


def _check_recompute(args: argparse.Namespace, options: EagleConfig) -> None:
    """Check what the draft's layers can recompute; the base keeps no activations at all."""
    if args.recompute_granularity == "full":
        raise UserError(
            "--recompute-granularity full is not supported: later steps attend to the keys of "
            "earlier ones; use --recompute-granularity selective --recompute-modules mlp"
        )
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


def _check_dimensions(args: argparse.Namespace, base: BaseInfo) -> None:
    for name, value in {**ABSENT, **base.megatron_args}.items():
        if name in ("vocab_size", "max_position_embeddings", "make_vocab_size_divisible_by"):
            continue
        parsed = getattr(args, _ALIASES.get(name, name), None)
        parsed = list(parsed) if isinstance(parsed, tuple) else parsed
        if parsed != value:
            raise UserError(
                f"{_flag(name)} {parsed} contradicts the base checkpoint, which has "
                f"{name} = {value}"
            )
    longest = base.megatron_args["max_position_embeddings"]
    if args.seq_length > longest:
        raise UserError(f"--seq-length {args.seq_length} exceeds the base's {longest} positions")


def _check_supported(argv: Sequence[str]) -> None:
    """Refuse unsupported flags before Megatron's own parser acts on them."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name, supported in _UNSUPPORTED.items():
        flag = _flag(name)
        if isinstance(supported, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=int, default=supported)
    values = vars(parser.parse_known_args(argv)[0])
    for name, supported in _UNSUPPORTED.items():
        if values[name] != supported:
            value = "" if isinstance(supported, bool) else f" {values[name]}"
            raise UserError(f"{_flag(name)}{value} is not supported yet")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
