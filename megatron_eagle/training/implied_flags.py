"""Choose the flags that the user did not name: by the base, by the data, by what is installed.

Three environments have to start alike: PyTorch with Megatron-Core alone, with Transformer Engine,
and with Apex. What is chosen for the user is said in one line.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib.util import find_spec

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.compat import require
from megatron_eagle.config import EagleConfig
from megatron_eagle.errors import UserError
from megatron_eagle.layers.backend import LOCAL, TRANSFORMER_ENGINE
from megatron_eagle.platform import is_enabled
from megatron_eagle.training.hybrid_flags import run_pattern
from megatron_eagle.training.layout import layout_flags, pipeline_stages
from megatron_eagle.training.megatron_flags import megatron_flags
from megatron_eagle.training.megatron_refusals import saved_to
from megatron_eagle.training.nan_stop import nan_flags, noted_iterations

CPU_FLAGS = [
    *("--distributed-backend", "gloo"),
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--disable-jit-fuser",  # compiling Megatron's small fusions takes longer than it saves
]
LOCAL_FLAGS = ["--no-persist-layer-norm", "--no-rope-fusion"]
"""Features that ``--transformer-impl local`` lacks: they need Transformer Engine or Apex."""

ALWAYS_FLAGS = ["--calculate-per-token-loss"]
"""The loss is normalised by one global token count, so Megatron must keep sums."""


def implied_flags(
    base: BaseInfo, options: EagleConfig, argv: Sequence[str], layers: str
) -> list[str]:
    """Return the flags that are put in front of the user's ``argv``, which win over them;
    ``layers`` as ``layer_implementation`` returns it."""
    args = dict(base.megatron_args)
    if (pattern := run_pattern(argv, base, pipeline_stages(argv))) is not None:
        args["hybrid_layer_pattern"] = pattern
    words = [*ALWAYS_FLAGS, *megatron_flags(args)]
    words += CPU_FLAGS if is_enabled() else []
    words += _layer_flags(options, layers)
    words += layout_flags(argv)
    save = saved_to(argv)
    words += nan_flags(argv, noted_iterations(save))
    if save is not None:
        words.append("--exit-signal-handler")  # SIGTERM, as schedulers send: save, then exit
    if options.train.reads_documents:
        # The data are token ids.
        words += ["--tokenizer-type", "NullTokenizer"]
    return words


def overriding_flags(options: EagleConfig) -> list[str]:
    """Return the flags that are put behind the user's, and win: documents have no validation split
    to evaluate, and every recipe asks for one."""
    if not options.train.reads_documents:
        return []
    return ["--eval-iters", "0", "--eval-interval", "1000000000"]


def tell(line: str) -> None:
    """Print a line once, on the first rank, before there are process groups."""
    if os.environ.get("RANK", "0") == "0":
        print(f"> {line}", flush=True)


def has_transformer_engine() -> bool:
    """Return whether Megatron finds Transformer Engine."""
    return bool(require("megatron.core.extensions.transformer_engine:HAVE_TE"))


def layer_implementation(argv: Sequence[str]) -> str:
    """Return the value of ``--transformer-impl``: the user's, or what is installed.

    Raises ``UserError`` for layers that this machine does not have.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--transformer-impl")
    named = parser.parse_known_args(argv)[0].transformer_impl
    if named == TRANSFORMER_ENGINE:
        if is_enabled():
            raise UserError(
                f"--transformer-impl {named} needs a CUDA device; use --transformer-impl {LOCAL}"
            )
        if not has_transformer_engine():
            raise UserError(
                f"--transformer-impl {named}: Transformer Engine is not installed; leave the flag "
                f"out, or use --transformer-impl {LOCAL}"
            )
    if named is not None:
        return str(named)
    if is_enabled():
        tell(f"no CUDA device: gloo, and Megatron-Core's own layers (--transformer-impl {LOCAL})")
        return LOCAL
    if has_transformer_engine():
        tell(f"Transformer Engine's layers, as Megatron chooses ({LOCAL}: its own)")
        return TRANSFORMER_ENGINE
    tell(
        f"Megatron-Core's own layers (--transformer-impl {LOCAL}): Transformer Engine is not "
        "installed"
    )
    return LOCAL


def _layer_flags(options: EagleConfig, layers: str) -> list[str]:
    """Return the choice between the two kinds of layers, and what either of them lacks."""
    words = ["--transformer-impl", layers]
    if layers == LOCAL:
        words += LOCAL_FLAGS
        if find_spec("fused_weight_gradient_mlp_cuda") is None:  # of Apex
            words += ["--no-gradient-accumulation-fusion"]
    elif options.train.pack or options.train.eval_prompts is not None:
        # Angles of packed documents and of decoding differ between the sequences of a batch.
        words += ["--no-rope-fusion"]
    return words
