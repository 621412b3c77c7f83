"""Take one argument of a trained model, or say in one line what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_eagle.errors import UserError, literal

Args = Mapping[str, Any]


def required(args: Args, name: str, source: str, values: tuple[Any, ...]) -> Any:
    """Return argument ``name``, which is one of ``values``."""
    if name not in args:
        raise _missing(name, source)
    if args[name] not in values:
        known = ", ".join(map(str, values))
        raise UserError(f"{source}: {name} {literal(args[name])} is not supported; known: {known}")
    return args[name]


def size(args: Args, name: str, source: str) -> int:
    """Return argument ``name``, a positive integer."""
    if args.get(name) is None:
        raise _missing(name, source)
    value = args[name]
    if type(value) is not int or value < 1:
        raise UserError(f"{source}: {name} must be a positive integer, found {literal(value)}")
    return value


def number(args: Args, name: str, source: str) -> float:
    """Return argument ``name``, a positive number."""
    if args.get(name) is None:
        raise _missing(name, source)
    value = args[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{source}: {name} must be a positive number, found {literal(value)}")
    return float(value)


def _missing(name: str, source: str) -> UserError:
    return UserError(
        f"{source}: the arguments of this checkpoint lack {name}; <base_description> can say what "
        "they do not (`megatron-eagle describe-base`)"
    )
