"""Typed fields of a config.json: each reader returns a valid value or raises ``UserError``.

The error names the file (``source``), the field and the value found. A missing or null field
stands for ``default``; without a default it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_eagle.errors import UserError, literal

LONGEST_SHOWN = 60
"""Characters of a refused value that an error message shows."""
LARGEST = {"num_hidden_layers": 10_000, "max_position_embeddings": 2**31}
LARGEST_SIZE = 2**24
LARGEST_NUMBER = 1e12
"""Bounds far above any model's, so that a damaged number is not taken for a request of memory."""


def size(config: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    """Return a positive integer, no larger than any model has."""
    value = _value(config, key, default)
    if type(value) is not int or value < 1:
        raise UserError(f"{source}: {key} must be a positive integer, found {_shown(value)}")
    most = LARGEST.get(key, LARGEST_SIZE)
    if value > most:
        raise UserError(f"{source}: {key} must be at most {most}, found {_shown(value)}")
    return value


def number(config: Mapping[str, Any], key: str, source: str, default: float | None = None) -> float:
    """Return a positive finite number, as a float."""
    value = _value(config, key, default)
    if type(value) not in (int, float) or not 0 < value <= LARGEST_NUMBER:
        raise UserError(f"{source}: {key} must be a positive number, found {_shown(value)}")
    return float(value)


def switch(config: Mapping[str, Any], key: str, source: str, default: bool = False) -> bool:
    """Return true or false."""
    value = _value(config, key, default)
    if not isinstance(value, bool):
        raise UserError(f"{source}: {key} must be true or false, found {_shown(value)}")
    return value


def require(config: Mapping[str, Any], values: Mapping[str, Any], source: str) -> None:
    """Refuse every field of ``values`` that config.json sets to another value.

    A missing field is accepted; a null field only where ``values`` says null.
    """
    for key, value in values.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{source}: {key} = {_shown(config[key])} is not supported, only {value!r}"
            )


def _value(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value


def _shown(value: Any) -> str:
    text = repr(value)
    return literal(text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "...")
