"""Whether a rendering holds what a conversation says: templates leave out what they do not read.

Templates may strip texts, join lines and escape them as JSON; all else counts as left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_eagle.data.chat.fields import tool_name
from megatron_eagle.data.chat.messages import Message

SHORT = 12
"""Characters of a text that a rendering may hold by chance."""

_TAG = "(?:think|thinking|thought|reasoning)"
_INLINE = re.compile(rf"\s*(?:<{_TAG}>)?(.*?)</{_TAG}>", re.DOTALL)


class LeftOut(ValueError):
    """Complaint that a rendering lacks what a message says."""


def check_context(text: str, messages: Iterable[Message]) -> None:
    """Raise ``ValueError`` naming the first of ``messages`` that is not all in ``text``."""
    messages, at = list(messages), 0
    for message in messages:
        content = message.content.strip()
        place = text.find(content, at)
        if place >= 0 and not message.calls:
            at = place + len(content)
            continue
        times = sum(other.content.strip() == content for other in messages) if content else 0
        if 1 <= text.count(content) < times:
            raise _left_out(message, f"text, which occurs {times} times")
        check_answer(text, message, 0, len(text))


def check_answer(text: str, message: Message, start: int, end: int) -> None:
    """Raise ``ValueError`` unless ``text`` holds the message's text and calls, each ending between
    ``start`` and ``end``: a prompt may have opened what the answer goes on with."""
    if not (_holds(text, message.content, start, end) or _holds_spoken(text, message, start, end)):
        raise _left_out(message, "text")
    for call in message.calls:
        if not _holds(text, call.name, start, end):
            raise _left_out(message, f"call of {call.name!r}")
        for value in _leaves(call.arguments) if call.arguments is not None else [call.text]:
            if not _holds(text, value, start, end):
                what = f"argument {value[:40]!r} of its call of {call.name!r}"
                raise _left_out(message, what)


def thinks(message: Message) -> bool:
    """Return whether ``message`` holds a thought, in its field or at the head of its text."""
    return bool(message.thought.strip() or _inline(message))


def holds_thought(text: str, message: Message, start: int, end: int) -> bool:
    """Return whether ``text`` between ``start`` and ``end`` holds what the message thinks."""
    inline = _inline(message)
    return all(
        _holds(text, thought, start, end) for thought in (message.thought, inline and inline[1])
    )


def holds_tools(text: str, tools: list[dict[str, Any]]) -> bool:
    """Return whether ``text`` names every tool."""
    names = map(tool_name, tools)
    return all(name in text for name in names if name is not None)


def _left_out(message: Message, what: str) -> LeftOut:
    place = f"message {message.number}" if message.number else "the system prompt"
    return LeftOut(f"{place}: the chat template leaves out the {message.role}'s {what}")


def _inline(message: Message) -> re.Match[str] | None:
    return _INLINE.match(message.content) if "</" in message.content else None


def _holds_spoken(text: str, message: Message, start: int, end: int) -> bool:
    """Return whether ``text`` holds the message's text after a thought at its head."""
    inline = _inline(message)
    return inline is not None and _holds(text, message.content[inline.end() :], start, end)


def _holds(text: str, wanted: str | None, start: int, end: int) -> bool:
    """Return whether ``text`` holds ``wanted`` so that it ends after ``start``, by ``end``."""
    wanted = (wanted or "").strip()
    if not wanted:
        return True
    if text.find(wanted, max(0, start - len(wanted) + 1), end) >= 0:
        return True
    escaped = json.dumps(wanted, ensure_ascii=False)[1:-1]
    part = text[max(0, start - 2 * len(escaped)) : end]
    return any(
        form in part for form in (escaped, json.dumps(wanted)[1:-1], json.dumps(escaped)[1:-1])
    ) or "".join(wanted.split()) in "".join(part.split())


def _leaves(value: Any) -> Iterator[str]:
    """Yield the names and values in the arguments of a call as they are spelled."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, bool) or value is None:
        return  # spelled in two ways, True or true
    else:
        yield json.dumps(value)
