"""Where a user's mistake ends a command: one ``error:`` line with the command's flags, status 2."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable

from megatron_eagle.errors import UserError

GRACE_SECONDS = 10.0
LARGEST_COUNT = 2**31 - 1
INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell gives it."""
TRACEBACK = "MEGATRON_EAGLE_TRACEBACK"
FlagOf = Callable[[str], str]
"""Maps the name of a parameter to the flag by which a command's user gives it."""


def run(
    command: Callable[[], int],
    flag_of: FlagOf,
    is_mistake: Callable[[Exception], bool] = lambda error: True,
) -> int:
    """Run ``command`` and return the exit status: its own, or 2 after one ``error:`` line.

    Of ``ValueError``, ``OSError`` and ``MemoryError``, those for which ``is_mistake`` is false are
    raised again, as every other exception is. Ctrl-C is one line and the status 130. The caller
    should end the process with a status other than 0 at once: other ranks may be waiting for this
    one. With ``MEGATRON_EAGLE_TRACEBACK`` in the environment the traceback is printed too.
    """
    try:
        return command()
    except (ValueError, OSError, MemoryError) as error:
        if not is_mistake(error):
            raise
        _print_traceback()
        _print_once(f"error: {shown(error, flag_of)}")
        return 2
    except KeyboardInterrupt:
        _print_traceback()
        sys.stdout.flush()
        if _rank() == 0:
            print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED


def shown(error: Exception, flag_of: FlagOf) -> str:
    """Return the message of ``error`` as one line, with a command's flags in place of
    parameters."""
    if isinstance(error, MemoryError):
        text = f"out of memory: {error}" if str(error) else "out of memory"
    else:
        text = error.named(flag_of) if isinstance(error, UserError) else str(error)
    return " ".join(text.split("\n"))


def flag(parameter: str) -> str:
    """Return the flag of a parameter: ``max_new_tokens`` -> ``--max-new-tokens``."""
    return "--" + parameter.replace("_", "-")


def names_of(flags: Iterable[str]) -> tuple[str, ...]:
    """Return the parameters that ``flags`` give: the inverse of ``flag``."""
    return tuple(word.removeprefix("--").replace("-", "_") for word in flags)


def flags_of(args: argparse.Namespace, **aliases: str) -> FlagOf:
    """Return the mapping of a command that has parsed ``args``.

    A parameter among ``aliases`` is shown as they say, one that the command has a flag for as that
    flag, and any other by its plain name.
    """

    def flag_of(parameter: str) -> str:
        if parameter in aliases:
            return aliases[parameter]
        return flag(parameter) if parameter in args else parameter

    return flag_of


def add_base_flags(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Declare the flags that name a base and, if need be, the file that describes it."""
    parser.add_argument(
        "--base", required=required, metavar="CKPT",
        help="base checkpoint, saved by Megatron as torch_dist or by `megatron-eagle import-base`",
    )  # fmt: skip
    parser.add_argument(
        "--base-description", metavar="FILE",
        help="description that is believed instead of what the checkpoint says "
        "(`megatron-eagle describe-base` writes one)",
    )  # fmt: skip


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raise ``UserError`` unless the options ``names`` are counts from 1 on, or left out
    (``None``)."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"<{name}> must be at least 1, not {value}")
        if value is not None and value > LARGEST_COUNT:
            raise UserError(f"<{name}> must be at most {LARGEST_COUNT}, not {value}")


def end_process_groups() -> None:
    """Destroy the process groups of a command that has made any. Call it after ``run``: a rank that
    found a mistake speaks before the others lose it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _print_once(line: str) -> None:
    """Print ``line``, of all ranks that would print it on the first one alone.

    A launcher stops all ranks as soon as one of them ends. The first rank therefore speaks first;
    the others give it time, and speak for themselves only if the mistake was theirs alone. In
    training SIGTERM asks for a save; a rank that waits here is ended by it.
    """
    if _rank() != 0:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE_SECONDS)
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _print_traceback() -> None:
    if os.environ.get(TRACEBACK):
        traceback.print_exc()
