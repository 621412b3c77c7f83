"""Typed fields of a config.json: each reader returns a valid value or raises ``UserError``.

The error names the file (``source``), the field and the value found. A missing or null field
stands for ``default``; without a default it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_eagle.errors import UserError

LONGEST_SHOWN = 60
"""Characters of a refused value that an error message shows."""


def size(config: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    """Return a positive integer."""
    value = _value(config, key, default)
    if type(value) is not int or value < 1:
        raise UserError(f"{source}: {key} must be a positive integer, found {value!r}")
    return value


def number(config: Mapping[str, Any], key: str, source: str, default: float | None = None) -> float:
    """Return a positive number, as a float."""
    value = _value(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{source}: {key} must be a positive number, found {value!r}")
    return float(value)


def switch(config: Mapping[str, Any], key: str, source: str, default: bool = False) -> bool:
    """Return true or false."""
    value = _value(config, key, default)
    if not isinstance(value, bool):
        raise UserError(f"{source}: {key} must be true or false, found {value!r}")
    return value


def require(config: Mapping[str, Any], values: Mapping[str, Any], source: str) -> None:
    """Refuse every field of ``values`` that config.json sets to another value.

    A missing field is accepted; a null field only where ``values`` says null.
    """
    for key, value in values.items():
        if config.get(key, value) != value:
            shown = repr(config[key])
            if len(shown) > LONGEST_SHOWN:
                shown = shown[: LONGEST_SHOWN - 3] + "..."
            raise UserError(f"{source}: {key} = {shown} is not supported, only {value!r}")


def _value(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value
