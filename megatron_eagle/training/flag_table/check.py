"""Check the user's command line against the table of flags, before Megatron acts on it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.training.flag_table.judgement import Judgement, Verdict
from megatron_eagle.training.flag_table.table import judgement_of, training_parser


@dataclass(frozen=True)
class GivenFlag:
    """A flag as the user wrote it: ``name``, its parsed ``value``, and the parser's ``default``."""

    name: str
    value: Any
    default: Any
    is_switch: bool
    judgement: Judgement | None

    def __str__(self) -> str:
        """Show it as it was written."""
        values = self.value if isinstance(self.value, list | tuple) else [self.value]
        words = [] if self.is_switch else [str(getattr(value, "name", value)) for value in values]
        return " ".join([self.name, *words])


@dataclass(frozen=True)
class CommandLine:
    """The user's flags in their order, and the parsed values of all flags by destination."""

    given: tuple[GivenFlag, ...]
    values: argparse.Namespace

    @classmethod
    def parse(cls, argv: Sequence[str]) -> CommandLine:
        """Parse ``argv``; raise ``UserError`` for a flag or a value that no parser knows."""
        parser = training_parser()
        values = parser.parse_args(argv)
        actions = {name: action for action in parser._actions for name in action.option_strings}
        given = {}
        for name in (word.split("=")[0] for word in argv):
            if name in actions and not name.startswith("--eagle-"):
                action = actions[name]
                given[name] = GivenFlag(
                    name,
                    getattr(values, action.dest),
                    parser.get_default(action.dest),
                    action.nargs == 0,
                    judgement_of(action),
                )
        return cls(tuple(given.values()), values)

    def flag(self, name: str) -> GivenFlag | None:
        """Return the flag ``name`` if the user wrote it."""
        return next((flag for flag in self.given if flag.name == name), None)


def check_flags(line: CommandLine, base_words: Sequence[str]) -> list[str]:
    """Check each flag of ``line`` by its judgement; ``base_words`` are the flags of the base.

    Returns a line of text for every reason for which flags have no effect. Raises ``UserError``
    naming the first flag that is refused or contradicts the base.
    """
    base = CommandLine.parse(base_words).values
    parser = training_parser()
    destinations = {
        name: action.dest for action in parser._actions for name in action.option_strings
    }
    without_effect: dict[str, list[str]] = {}
    for flag in line.given:
        judgement = flag.judgement
        if judgement is None or judgement.verdict is Verdict.HONOURED:
            continue
        if judgement.verdict is Verdict.OF_BASE:
            _check_base(flag, getattr(base, destinations[flag.name]))
        elif judgement.verdict is Verdict.NO_EFFECT:
            without_effect.setdefault(judgement.why, []).append(str(flag))
        elif flag.value != flag.default and not _is_allowed(flag.value, judgement.unless):
            raise UserError(f"{flag} {judgement.why}")
    return [f"no effect: {', '.join(flags)} ({why})" for why, flags in without_effect.items()]


def _check_base(flag: GivenFlag, expected: Any) -> None:
    if _plain(flag.value) == _plain(expected):
        return
    has = "was made without it" if flag.is_switch else f"has {expected}"
    raise UserError(f"{flag} contradicts the base checkpoint, which {has}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_allowed(value: Any, allowed: Sequence[Any]) -> bool:
    return getattr(value, "name", value) in allowed
