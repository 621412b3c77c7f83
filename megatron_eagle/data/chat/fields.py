"""Fields of records as tools write them: columnar files give every row every column, often null.

A null field is an absent field, at every depth, and so is an empty one of a record or a message.
JSON that stands in a text is taken as it is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MEDIA_NAMES = (
    *("image", "images", "image_url", "video", "videos", "video_url"),
    *("audio", "audios", "audio_url", "input_audio"),
)
"""Fields that hold pictures or sound, which no token here stands for."""


def refuse_media(holder: Mapping[str, Any], place: str) -> None:
    """Raise ``ValueError`` naming ``place`` if ``holder`` has pictures or sound in a field."""
    for name in MEDIA_NAMES:
        if not is_absent(holder.get(name)):
            raise ValueError(f"{name!r} {place}: only text can be read")


def without_nulls(value: Any) -> Any:
    """Return ``value`` without the keys whose values are null, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def is_absent(value: Any) -> bool:
    """Return whether a field of this value says nothing: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def first_of(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """Return the value that ``record`` has under one of ``names``; None if it has none.

    Raises ``ValueError`` when two of them have different values.
    """
    present = [name for name in names if not is_absent(record.get(name))]
    for name in present[1:]:
        if record[name] != record[present[0]]:
            raise ValueError(f"{present[0]!r} and {name!r} differ")
    return record[present[0]] if present else None


def parse_json(text: str, name: str) -> Any:
    """Return what the JSON ``text`` of field ``name`` holds; raise ``ValueError`` if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON ({error})") from None


def tool_list(value: Any, name: str) -> list[dict[str, Any]]:
    """Return the tools of field ``name``: a list, one object, or the JSON text of either or of one.

    A function's bare schema in a field of ``functions`` becomes a tool. Raises ``ValueError``
    naming the field.
    """
    if isinstance(value, str):
        value = parse_json(value, repr(name))
    if value is None:
        return []
    tools = value if isinstance(value, list) else [value]
    tools = [parse_json(tool, repr(name)) if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{name!r} is not a list of tools, which are objects")
    if name == "functions":
        tools = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    return tools


def tool_name(tool: Mapping[str, Any]) -> str | None:
    """Return the name of a tool in either form, if it has one."""
    function = tool.get("function")
    name = (function if isinstance(function, dict) else tool).get("name")
    return name if isinstance(name, str) else None
