"""What Megatron asserts about flags and files, as one line: ours before its own, and its own.

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


def check_save(argv: Sequence[str]) -> None:
    """Raise ``UserError`` for a ``--save`` that would save nothing before the run ends."""
    given = _parse(argv)
    if given.save is not None and given.save_interval is None:
        raise UserError(
            f"--save {literal(given.save)} needs --save-interval, after how many iterations"
        )


def saved_to(argv: Sequence[str]) -> str | None:
    """Return the value of ``--save`` in ``argv``."""
    return _parse(argv).save


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for flag in ("--save", "--save-interval"):
        parser.add_argument(flag)
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
    """Make what fails in the files of Megatron's tokenizer one line, and a tokenizer of another
    vocabulary than the base's. Must run before Megatron parses its flags, which builds it."""
    build = require(_TOKENIZER)

    @functools.wraps(build)
    def build_tokenizer(args: Any, *rest: Any, **options: Any) -> Any:
        with reading("tokenizer_model", args.tokenizer_model):
            tokenizer = build(args, *rest, **options)
        if not args.tokenizer_type.startswith("Null"):
            _check_vocabulary(tokenizer, args)
        return tokenizer

    patch(_TOKENIZER, build_tokenizer, "name the tokenizer that cannot be read")


def _check_vocabulary(tokenizer: Any, args: argparse.Namespace) -> None:
    """Raise ``UserError`` for a tokenizer with more ids than the base. A padding token behind the
    last id is let through: public models have one, and nothing is ever padded with it."""
    size, known = tokenizer.vocab_size, args.vocab_size
    padding = int(size == known + 1 and tokenizer.pad == known)
    if size - padding > known:
        raise UserError(
            f"<tokenizer_model> {literal(args.tokenizer_model)}: has {size} token ids, the base "
            f"{known}; is it another model's tokenizer?"
        )


def _source_line(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return line or type(error).__name__
