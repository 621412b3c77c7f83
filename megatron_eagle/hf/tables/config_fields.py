"""Typed fields of a config.json: the value, or a ValueError that names file, field and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def size(config: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    """A positive integer; a missing or null field means `default`, if there is one."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ValueError(f"{source}: {key} must be a positive integer, found {value!r}")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None, source: str) -> float:
    """A positive number; a missing or null field means `default`, if there is one."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{source}: {key} must be a positive number, found {value!r}")
    return value


def switch(config: Mapping[str, Any], key: str, default: bool, source: str) -> bool:
    """true or false; a missing or null field means `default`."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ValueError(f"{source}: {key} must be true or false, found {value!r}")
    return value


def require(config: Mapping[str, Any], values: Mapping[str, Any], source: str) -> None:
    """Refuse fields that are there with another value than the one supported."""
    for key, value in values.items():
        if config.get(key, value) != value:
            shown = repr(config[key])
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise ValueError(f"{source}: {key} = {shown} is not supported, only {value!r}")
