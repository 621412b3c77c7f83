"""An option: a dataclass field that carries its command-line flag, its help and its checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_eagle.errors import UserError

LARGEST = 2**31 - 1
"""Largest value of an option: a larger one is a slip, not a request of that much memory."""


def option(
    default: Any, help_text: str, *, least: int | None = None, most: int = LARGEST, **flag: Any
) -> Any:
    """Make a dataclass field; ``flag`` goes to ``ArgumentParser.add_argument``.

    ``least`` and ``most`` are the smallest and the largest value allowed.
    """
    metadata = {"help": help_text, "flag": flag, "least": least, "most": most}
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(field_name: str) -> str:
    """Return the flag of an option: ``ttt_steps`` -> ``--eagle-ttt-steps``."""
    return "--eagle-" + field_name.replace("_", "-")


def shown(name: str, value: Any) -> str:
    """Return an option and its value as a user would have typed them."""
    words = value if isinstance(value, tuple) else () if value is True else (value,)
    return " ".join([f"<{name}>", *map(str, words)])


def given(options: Any) -> dict[str, Any]:
    """Return the options that differ from their defaults, by name."""
    fields = dataclasses.fields(options)
    values = {field.name: getattr(options, field.name) for field in fields}
    return {
        field.name: values[field.name] for field in fields if values[field.name] != field.default
    }


def check_ranges(options: Any) -> None:
    """Raise :class:`UserError` for the first value below its field's ``least``, above its ``most``
    or not among its ``choices``; a value of None is not checked."""
    for field in dataclasses.fields(options):
        value, least = getattr(options, field.name), field.metadata["least"]
        if value is None:
            continue
        if least is not None and value < least:
            raise UserError(f"<{field.name}> must be at least {least}, not {value}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not number <= field.metadata["most"]:
                raise UserError(
                    f"<{field.name}> must be at most {field.metadata['most']}, not {number}"
                )
        choices = field.metadata["flag"].get("choices")
        if choices is not None and value not in choices:
            raise UserError(f"<{field.name}> must be one of {', '.join(choices)}, not {value}")


def check_types(kind: type, values: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` unless ``values``, decoded from JSON, fit the fields of ``kind``:
    known names, and each value of the type that its flag gives (or the default)."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(fields)):
        raise UserError(f"unknown field {unknown[0]!r}")
    for name, value in values.items():
        field = fields[name]
        expected = _expected(field)
        several = "nargs" in field.metadata["flag"] and isinstance(value, list | tuple)
        items = value if several else [value]
        if value is None and field.default is None:
            continue
        if any(type(item) is not expected for item in items):
            raise UserError(f"{name} must be of type {expected.__name__}, found {value!r}")


def _expected(field: dataclasses.Field) -> type:
    default = str if field.default is None else type(field.default)
    return field.metadata["flag"].get("type", default)


def names(kind: Any) -> Iterable[str]:
    """Return the names of the options of a class, in order."""
    return tuple(field.name for field in dataclasses.fields(kind))
