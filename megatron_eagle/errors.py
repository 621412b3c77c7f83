"""UserError: a mistake in what a user gave, worded without the flags of any one command."""

from __future__ import annotations

import re
from collections.abc import Callable

_PARAMETER = re.compile(r"(?<![\w'\"])<([a-z][a-z0-9_]+)>(?!['\"])")
"""A name in angle brackets, but not a quoted one: that is a user's text, such as a token."""


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the parameter or file at fault.

    Library code knows parameters, not the flags that a command gave them by. So a message writes a
    parameter as ``<name>``: ``UserError("<format> gguf: not one of hf, vllm")``. ``str()`` shows
    its plain name, and a command shows its own flag through ``named``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.named(lambda parameter: parameter)

    def named(self, flag_of: Callable[[str], str]) -> str:
        """Return the message with ``flag_of(name)`` in place of every ``<name>``."""
        return _PARAMETER.sub(lambda match: flag_of(match[1]), self.message).replace("<\0", "<")


def names_parameter(error: UserError) -> bool:
    """Tell whether the message of ``error`` names a parameter."""
    return _PARAMETER.search(error.message) is not None


def literal(text: object) -> str:
    """Return ``text`` of a user for a message of ``UserError``, kept from being read as ``<name>``.

    A zero byte, which no printed message holds, follows each ``<``; ``named`` takes it out.
    """
    return str(text).replace("<", "<\0")


def message_of(error: BaseException) -> str:
    """Return the message of ``error`` with every ``<name>`` kept, to put it into another error.

    What another library's error says is ``literal``.
    """
    return error.message if isinstance(error, UserError) else literal(error)
