"""The command line: Megatron's flags, ours, and what the base's own description already says.

``--eagle-base-checkpoint`` alone tells the base's dimensions: their flags are put in front of the
user's, and a flag of the user's that contradicts them is an error. On a machine without CUDA the
flags that a CPU needs are put in front too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from megatron.training.arguments import parse_and_validate_args

from megatron_eagle.checkpoint.directory import BaseInfo, load_base_json
from megatron_eagle.config import EagleConfig
from megatron_eagle.config.flags import add_eagle_flags
from megatron_eagle.hf.base.megatron_args import ABSENT
from megatron_eagle.platform import is_enabled
from megatron_eagle.training.base_start import check_base_start
from megatron_eagle.training.layout import check_layout, check_micro_batches, layout_flags
from megatron_eagle.training.megatron_flags import megatron_flags

CPU_FLAGS = [
    *("--distributed-backend", "gloo", "--transformer-impl", "local"),
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--disable-jit-fuser",  # compiling Megatron's small fusions takes longer than it saves
]
LOCAL_FLAGS = ["--no-persist-layer-norm", "--no-rope-fusion"]
"""What ``--transformer-impl local`` lacks, on any device: both need Transformer Engine or Apex."""

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
"""--recompute-modules that the draft's layers can honour. The first layer's norm returns its
residual too, which Megatron's checkpointing of norms does not expect."""


def parse_eagle_args(options: EagleConfig) -> tuple[argparse.Namespace, BaseInfo]:
    """Parse ``sys.argv`` into Megatron's args, and read the base's description.

    Raises ``ValueError`` naming the flag for a mistake that every rank sees alike.
    """
    user = sys.argv[1:]
    base = _base_info(options.train.base_checkpoint)
    _check_supported(user)
    if "--multi-latent-attention" in user and "multi_latent_attention" not in base.megatron_args:
        raise ValueError("--multi-latent-attention contradicts the base checkpoint, which has none")
    check_layout(user, base, options)
    check_base_start(options, base)
    sys.argv[1:] = [*_implied_flags(base, options, user), *user]
    args = parse_and_validate_args(extra_args_provider=add_eagle_flags)
    _check_dimensions(args, base)
    _check_recompute(args, options)
    if options.train.reads_documents and args.eval_iters:
        flag = "train-data" if options.train.offline_features is None else "offline-features"
        raise ValueError(f"--eval-iters {args.eval_iters}: --eagle-{flag} has no validation")
    check_micro_batches(args)
    if options.train.pack:
        _check_packing(args)
    options.check_against_base(args.num_layers, base.vocab_size, args.seq_length)
    return args, base


def show_help() -> None:
    """Print Megatron's flags and ours, and exit."""
    parse_and_validate_args(extra_args_provider=_add_flags_and_mend_help)


def _add_flags_and_mend_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron 0.19.2 has a bare % in a help text, on which argparse fails instead of helping."""
    for action in parser._actions:
        try:
            _ = (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")
    return add_eagle_flags(parser)


def _base_info(directory: str | None) -> BaseInfo:
    assert directory is not None
    try:
        return load_base_json(directory)
    except ValueError as error:
        raise ValueError(f"--eagle-base-checkpoint {error}") from error


def _implied_flags(base: BaseInfo, options: EagleConfig, user: Sequence[str]) -> list[str]:
    words = [*ALWAYS_FLAGS, *megatron_flags(base.megatron_args)]
    if is_enabled():
        words += CPU_FLAGS
    if is_enabled() or _uses_local_layers(user):
        words += LOCAL_FLAGS
    if find_spec("fused_weight_gradient_mlp_cuda") is None:  # Apex's, which both heads' layers want
        words += ["--no-gradient-accumulation-fusion"]
    words += layout_flags(user)
    if options.train.reads_documents:
        # The file holds ids, and no validation split.
        words += ["--tokenizer-type", "NullTokenizer", "--eval-iters", "0"]
        words += ["--eval-interval", "1000000000"]
    return words


def _uses_local_layers(user: Sequence[str]) -> bool:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--transformer-impl")
    return parser.parse_known_args(user)[0].transformer_impl == "local"


def _check_packing(args: argparse.Namespace) -> None:
    """Documents are known to our core attention, and to the RoPE angles that GPTModel looks up."""
    if args.transformer_impl != "local":
        raise ValueError(
            f"--eagle-pack needs --transformer-impl local, not {args.transformer_impl}"
        )


def _check_recompute(args: argparse.Namespace, options: EagleConfig) -> None:
    """The base keeps no activations at all, so only the draft's layers are concerned."""
    if args.recompute_granularity == "full":
        raise ValueError(
            "--recompute-granularity full is not supported: later steps attend to the keys of "
            "earlier ones; use --recompute-granularity selective --recompute-modules mlp"
        )
    for module in args.recompute_modules or ():
        if args.recompute_granularity is not None and module not in RECOMPUTABLE:
            raise ValueError(
                f"--recompute-modules {module} is not supported, only {' and '.join(RECOMPUTABLE)}"
            )
        experts = options.spec.num_experts
        if module == "mlp" and args.recompute_granularity is not None and experts:
            raise ValueError(
                f"--recompute-modules mlp: a draft of --eagle-num-experts {experts} "
                "has none, and experts are not recomputed"
            )


def _check_dimensions(args: argparse.Namespace, base: BaseInfo) -> None:
    for name, value in {**ABSENT, **base.megatron_args}.items():
        if name in ("vocab_size", "max_position_embeddings", "make_vocab_size_divisible_by"):
            continue
        given = getattr(args, _ALIASES.get(name, name), None)
        given = list(given) if isinstance(given, tuple) else given
        if given != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} {given} contradicts the base checkpoint, which has {name} = {value}"
            )
    longest = base.megatron_args["max_position_embeddings"]
    if args.seq_length > longest:
        raise ValueError(f"--seq-length {args.seq_length} exceeds the base's {longest} positions")


def _check_supported(user: Sequence[str]) -> None:
    """Before Megatron's own parser too: it would build on what is refused here."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name, supported in _UNSUPPORTED.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(supported, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=int, default=supported)
    given = vars(parser.parse_known_args(user)[0])
    for name, supported in _UNSUPPORTED.items():
        if given[name] != supported:
            shown = "" if isinstance(supported, bool) else f" {given[name]}"
            raise ValueError(f"--{name.replace('_', '-')}{shown} is not supported yet")
