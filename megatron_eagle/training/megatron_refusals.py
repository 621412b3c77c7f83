"""Refusals of Megatron's flags: ours before its parser acts on them, and its own as one line.

Megatron's ``validate_args`` is a list of assertions, many without words.
"""

from __future__ import annotations

import argparse
import functools
import linecache
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from megatron_eagle.compat import patch, require
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import first_line, reading

_TOKENIZER = "megatron.training.global_vars:build_tokenizer"
CHECKPOINT_FORMAT = "torch_dist"


def check_megatron_flags(argv: Sequence[str]) -> None:
    """Raise ``UserError`` naming the flag for one that would end in a checkpoint nobody reads, in a
    run whose end is lost, or in code of somebody else's."""
    given = _parse(argv)
    if given.ckpt_format not in (None, CHECKPOINT_FORMAT):
        raise UserError(
            f"--ckpt-format {literal(given.ckpt_format)}: only {CHECKPOINT_FORMAT} is supported: "
            "no command reads another, and --load does not either"
        )
    if given.save is not None and given.save_interval is None:
        raise UserError(
            f"--save {literal(given.save)} needs --save-interval, after how many iterations"
        )
    if given.trust_remote_code:
        raise UserError(
            "--trust-remote-code: Python code beside a tokenizer is never run; give the token ids "
            "that a program you trust has made"
        )
    if given.enable_msc:
        raise UserError("--enable-msc is not supported: checkpoints are read from a file system")
    if given.non_persistent_ckpt_type == "local":
        raise UserError("--non-persistent-ckpt-type local is not supported, only global")


def saved_to(argv: Sequence[str]) -> tuple[str | None, int]:
    """Return ``--save`` and the number of pipeline stages in ``argv``."""
    given = _parse(argv)
    return given.save, given.pipeline_model_parallel_size


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for flag in ("--ckpt-format", "--save", "--save-interval", "--non-persistent-ckpt-type"):
        parser.add_argument(flag)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    for flag in ("--trust-remote-code", "--enable-msc"):
        parser.add_argument(flag, action="store_true")
    return parser.parse_known_args(argv)[0]


def in_one_line(parse: Callable[..., Any], **options: Any) -> Any:
    """Call Megatron's ``parse`` and turn what its checks raise into a ``UserError``.

    An assertion without words is shown as it stands in Megatron's source.
    """
    try:
        return parse(**options)
    except UserError:
        raise
    except Exception as error:
        words = first_line(error) or _source_line(error)
        raise UserError(f"Megatron refuses these flags: {literal(words)}") from error


def name_tokenizer_in_errors() -> None:
    """Make what fails in the files of Megatron's tokenizer one line. Must run before
    ``pretrain()``."""
    build = require(_TOKENIZER)

    @functools.wraps(build)
    def build_tokenizer(args: Any, *rest: Any, **options: Any) -> Any:
        with reading("tokenizer_model", args.tokenizer_model):
            return build(args, *rest, **options)

    patch(_TOKENIZER, build_tokenizer, "name the tokenizer that cannot be read")


def _source_line(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return line or type(error).__name__
