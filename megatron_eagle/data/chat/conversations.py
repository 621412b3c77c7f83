"""Parser of chat records in the two common JSONL forms, which it checks and turns into one.

OpenAI: ``{"messages": [{"role", "content"}]}``; ``tool_calls``, ``reasoning_content`` and any
other field that a template may read are kept. ShareGPT: ``{"conversations": [{"from", "value"}]}``.
Either list may have either name, and ``tools`` may accompany it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"},
    **{"model": "assistant", "developer": "system", "observation": "tool", "function": "tool"},
    **{"function_call": "assistant", "function_response": "tool", "tool_response": "tool"},
}
_MAY_FOLLOW = {
    None: {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"tool", "assistant", "user"},
}


@dataclass(frozen=True)
class Conversation:
    """Messages in an order that chat templates accept, at least one of them the assistant's."""

    messages: list[Message]
    tools: list[Any] | None = None


def parse_conversation(record: Mapping[str, Any]) -> Conversation:
    """Return the conversation in ``record``.

    Messages after the last answer are dropped. A system message must come first, user and assistant
    must alternate, and tool results must follow an assistant. Raises ``ValueError`` saying which
    message is wrong, and how.
    """
    entries = record.get("messages", record.get("conversations"))
    if not isinstance(entries, list) or not entries:
        raise ValueError("the conversation is empty")
    messages = [_message(entry, number) for number, entry in enumerate(entries, start=1)]
    previous = None
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in _MAY_FOLLOW[previous]:
            after = f"after {previous!r}" if previous else "at the start"
            raise ValueError(f"message {number}: roles out of order: {role!r} {after}")
        previous = role
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise ValueError("no assistant message in the conversation")
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _json_or_none(tools)
    if tools is not None and not isinstance(tools, list):
        raise ValueError("'tools' is not a list")
    return Conversation(messages, tools or None)


def _message(entry: Any, number: int) -> Message:
    if not isinstance(entry, dict):
        raise ValueError(f"message {number}: not a JSON object")
    sharegpt = "from" in entry and "role" not in entry
    name = entry.get("from" if sharegpt else "role")
    if not isinstance(name, str) or name not in _ROLES:
        raise ValueError(f"message {number}: unknown role {name!r}")
    rest = {k: v for k, v in entry.items() if k not in ("from", "value", "role", "content")}
    content = _text(entry.get("value" if sharegpt else "content"), number)
    if name == "function_call":
        call = _json_or_none(content)
        if not isinstance(call, dict):
            raise ValueError(f"message {number}: a function_call must hold a JSON object")
        content, rest["tool_calls"] = "", [call]
    message: Message = {"role": _ROLES[name], "content": content, **rest}
    if message.get("tool_calls") is None:
        message.pop("tool_calls", None)
    else:
        message["tool_calls"] = _tool_calls(message["tool_calls"], number)
    if message["role"] == "assistant" and not content.strip() and "tool_calls" not in message:
        raise ValueError(f"message {number}: the assistant says nothing")
    return message


def _text(content: Any, number: int) -> str:
    """Return the text of a string, of OpenAI's list of text parts, or of null (with tool calls)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise ValueError(f"message {number}: the content is neither text nor a list of text parts")


def _tool_calls(calls: Any, number: int) -> list[Any]:
    """Parse the arguments of calls: a JSON string in OpenAI's API, an object for templates."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"message {number}: 'tool_calls' is not a list of objects")
    parsed_calls = []
    for call in calls:
        function = dict(call.get("function", call))
        if isinstance(function.get("arguments"), str):
            parsed = _json_or_none(function["arguments"])
            function["arguments"] = parsed if isinstance(parsed, dict) else function["arguments"]
        outer = {k: v for k, v in call.items() if k not in ("name", "arguments")}
        parsed_calls.append({"type": "function", **outer, "function": function})
    return parsed_calls


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None
