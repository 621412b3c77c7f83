"""Parser of one message of a chat, in any of the forms in use, to one form.

OpenAI: ``{"role", "content"}``; ShareGPT: ``{"from", "value"}``. Text and thinking may be parts of
a list, thinking may have a field of its own under several names, and calls may hold their arguments
as an object or as its JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_eagle.data.chat.fields import (
    first_of,
    is_absent,
    parse_json,
    refuse_media,
    without_nulls,
)

THOUGHT_NAMES = ("reasoning_content", "thinking", "reasoning", "thought", "thoughts", "think")
"""Fields that hold what the assistant thinks before it answers."""
WEIGHT_NAMES = ("weight", "train", "trainable", "loss_mask")
"""Fields that say whether an answer is to be learned: a number or a truth value, 0 or 1."""

ARGUMENT_NAMES = ("arguments", "parameters", "input")
"""Fields that hold the arguments of a call."""

_TEXT_PARTS = (None, "text", "input_text", "output_text")
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"},
    **{"model": "assistant", "observation": "tool", "function": "tool", "ipython": "tool"},
    **{"function_call": "assistant", "function_response": "tool", "tool_response": "tool"},
}
_OWN_FIELDS = {"from", "value", "role", "content", "tool_calls", "function_call", *WEIGHT_NAMES}


@dataclass(frozen=True)
class Call:
    """A call of a tool: ``arguments`` as an object (None: ``text`` is none) and as JSON text."""

    name: str
    arguments: dict[str, Any] | None
    text: str
    outer: dict[str, Any] = field(default_factory=dict)
    inner: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """A message in one form: ``role`` is system, developer, user, assistant or tool.

    ``thought`` is what an assistant thinks before it answers. ``supervised`` is false for answers
    that are context only. ``fields`` holds whatever else the record says, for templates that read
    it. ``number`` is the message's place in its record, counted from 1.
    """

    role: str
    content: str
    number: int = 0
    thought: str = ""
    calls: tuple[Call, ...] = ()
    supervised: bool = True
    fields: dict[str, Any] = field(default_factory=dict)


def as_record(message: Message) -> dict[str, Any]:
    """Return ``message`` in OpenAI's form, which ``parse_message`` reads."""
    record = {"role": message.role, "content": message.content, **message.fields}
    if message.thought:
        record["reasoning_content"] = message.thought
    if message.calls:
        record["tool_calls"] = [
            {
                "type": "function",
                **call.outer,
                "function": {"name": call.name, "arguments": call.text, **call.inner},
            }
            for call in message.calls
        ]
    return record


def parse_message(entry: Any, number: int) -> Message:
    """Return message ``number`` of a record; raise ``ValueError`` that names it if it is bad."""
    where = f"message {number}" if number else "the system prompt"
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: not a JSON object")
    try:
        return _parse(without_nulls(entry), number)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _parse(entry: dict[str, Any], number: int) -> Message:
    refuse_media(entry, "in the message")
    name, role = _role(entry)
    said = first_of(entry, ("content", "value"))
    calls: tuple[Call, ...] = ()
    if name == "function_call":
        said, calls = None, _calls(said, name)
    content, thought = _text(said)
    rest = {k: v for k, v in entry.items() if k not in _OWN_FIELDS and not is_absent(v)}
    if role == "assistant":
        thought = _thought(rest, thought)
        for field_name in ("tool_calls", "function_call"):
            calls += _calls(entry.get(field_name), field_name)
        if not content.strip() and not calls:
            raise ValueError("the assistant says nothing")
    elif thought:
        raise ValueError(f"thinking of a {role!r}, which only the assistant does")
    elif said is None and role != "tool" and not ("content" in entry or "value" in entry):
        raise ValueError(f"the {role!r} message has no content")
    if role == "assistant":
        return Message(role, content, number, thought, calls, _is_supervised(entry), rest)
    rest |= {name: entry[name] for name in WEIGHT_NAMES if entry.get(name)}
    return Message(role, content, number, fields=rest)


def _role(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Return the role as the record names it, in lower case, and as this package does."""
    names = [entry[key] for key in ("role", "from") if not is_absent(entry.get(key))]
    for name in names or [None]:
        if not isinstance(name, str) or name.lower() not in _ROLES:
            raise ValueError(f"unknown role {name!r}")
    if len({_ROLES[name.lower()] for name in names}) > 1:
        raise ValueError(f"two roles, {names[0]!r} and {names[1]!r}")
    return names[0].lower(), _ROLES[names[0].lower()]


def _thought(fields: dict[str, Any], part: str) -> str:
    """Return the thought in ``part`` or under one of its names in ``fields``, which lose it."""
    thoughts = {"a part of the content": part}
    for name in THOUGHT_NAMES:
        if name in fields:
            if not isinstance(fields[name], str | list):
                raise ValueError(f"{name!r} is not text")
            thoughts[name] = _text(fields.pop(name))[0]
    return first_of(thoughts, tuple(thoughts)) or ""


def _text(content: Any) -> tuple[str, str]:
    """Return text and thinking of a string, of a list of parts, or of an absent content."""
    if content is None:
        return "", ""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise ValueError("the content is neither text nor a list of text parts")
    texts, thoughts = [], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") in ("thinking", "reasoning"):
            value = first_of(part, ("thinking", "reasoning", "text", "content"))
            thoughts.append(_text(value)[0])
        else:
            texts.append(_part_text(part))
    return "".join(texts), "".join(thoughts)


def _part_text(part: Any) -> str:
    """Return the text of a part that is text; one that holds nothing has none."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if isinstance(part, dict):
        refuse_media(part, "in a part of the content")
        text = part.get("text", "" if kind else None)
        if kind in _TEXT_PARTS and isinstance(text, str):
            return text
    raise ValueError(f"the content is neither text nor a list of text parts: one is {kind!r}")


def _calls(value: Any, name: str) -> tuple[Call, ...]:
    """Return the calls of field ``name``: a list, one object, or the JSON text of either."""
    if isinstance(value, str) and value:
        value = parse_json(value, f"the {name}")
    if is_absent(value):
        return ()
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{name!r} is not a list of objects")
    return tuple(map(_call, calls))


def _call(call: Mapping[str, Any]) -> Call:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a call names no function")
    own = ("function", "name", *ARGUMENT_NAMES)
    outer = {k: v for k, v in call.items() if k not in own}
    inner = {k: v for k, v in function.items() if k not in (*own, *outer)}
    arguments = first_of(function, ARGUMENT_NAMES)
    arguments = {} if arguments in (None, "null") else arguments
    if isinstance(arguments, dict):
        text = json.dumps(arguments, ensure_ascii=False)
        return Call(function["name"], arguments, text, outer, inner)
    if not isinstance(arguments, str):
        raise ValueError(f"the arguments of call {function['name']!r} are no object")
    try:
        parsed = parse_json(arguments, "the arguments")
    except ValueError:
        parsed = None
    parsed = parsed if isinstance(parsed, dict) else None
    return Call(function["name"], parsed, arguments, outer, inner)


def _is_supervised(entry: Mapping[str, Any]) -> bool:
    weights = {name: entry[name] for name in WEIGHT_NAMES if not is_absent(entry.get(name))}
    for name, weight in weights.items():
        if weight not in (0, 1):  # also False and True
            raise ValueError(f"{name!r} is {weight!r}; an answer is learned (1) or not (0)")
    return all(weights.values())
