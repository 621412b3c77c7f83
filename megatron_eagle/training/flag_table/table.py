"""All judgements, by flag, and Megatron's parser beside them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from typing import NoReturn

from megatron_eagle.config.flags import add_eagle_flags
from megatron_eagle.errors import UserError, literal
from megatron_eagle.teacher.megatron_parser import megatron_parser
from megatron_eagle.training.flag_table import (
    layer_flags,
    model_flags,
    other_flags,
    run_flags,
    system_flags,
)
from megatron_eagle.training.flag_table.judgement import Judgement

PARTS: dict[str, Sequence[Judgement]] = {
    "The network": model_flags.JUDGEMENTS,
    "How layers compute": layer_flags.JUDGEMENTS,
    "The run": run_flags.JUDGEMENTS,
    "Processes and files": system_flags.JUDGEMENTS,
    "Other uses of Megatron": other_flags.JUDGEMENTS,
}
"""The judgements under the headings of the reference."""

BY_FLAG = {
    flag: judgement
    for judgements in PARTS.values()
    for judgement in judgements
    for flag in judgement.flags
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are a user's mistakes, in one line and without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(literal(message.removeprefix("argument ")))


@cache
def training_parser() -> argparse.ArgumentParser:
    """Return a parser of Megatron's flags and ``--eagle-*``, made once in a process; it raises
    ``UserError``."""
    parents = [megatron_parser()]
    return add_eagle_flags(_Parser(parents=parents, allow_abbrev=False, add_help=False))


def judgement_of(action: argparse.Action) -> Judgement | None:
    """Return the judgement of one of the parser's flags, whichever of its names the table has."""
    return next((BY_FLAG[name] for name in action.option_strings if name in BY_FLAG), None)
