"""Parser of chat records in the two common JSONL forms, which it checks and turns into one.

OpenAI: ``{"messages": [...]}``; ShareGPT: ``{"conversations": [...]}``. Either list may have either
form of messages. Beside it may stand a system prompt, tools, and variables of the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_eagle.data.chat.fields import (
    first_of,
    is_absent,
    parse_json,
    refuse_media,
    tool_list,
    without_nulls,
)
from megatron_eagle.data.chat.messages import Message, parse_message
from megatron_eagle.data.chat.rendering import RESERVED

CHAT_NAMES = ("messages", "conversations")
_SYSTEM_NAMES = ("system", "system_prompt", "system_message")
_TOOL_NAMES = ("tools", "functions")
_VARIABLES = {"enable_thinking": bool, "thinking": bool, "reasoning_effort": str}
"""Variables of templates that records are known to hold by themselves."""
_SETTINGS = (*_SYSTEM_NAMES, *_TOOL_NAMES, *_VARIABLES, "chat_template_kwargs")
_READ = {*CHAT_NAMES, *_SETTINGS, "id", "prompt_ids", "answer_ids"}


@dataclass(frozen=True)
class Conversation:
    """Messages in an order that servers take, and what stands beside them.

    ``variables`` are the chat template's. ``openings`` counts answers before the first question,
    which were left out; ``unread`` names the record's fields that nothing here reads.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    openings: int = 0
    unread: tuple[str, ...] = ()


def is_chat(record: Mapping[str, Any]) -> bool:
    """Return whether ``record`` holds a conversation, be it empty."""
    return any(record.get(name) is not None for name in CHAT_NAMES)


def parse_conversation(record: Mapping[str, Any]) -> Conversation:
    """Return the conversation in ``record``, up to the last answer that is to be learned.

    Answers before the first question are left out. An assistant's message must follow somebody
    else's, and tool results an assistant's or another's. Raises ``ValueError`` saying which message
    is wrong, and how.
    """
    conversation = _parse(record)
    messages = conversation.messages
    if not any(message.role == "assistant" for message in messages):
        raise ValueError("no assistant message in the conversation, or none after a user's")
    while messages and not (messages[-1].role == "assistant" and messages[-1].supervised):
        messages.pop()
    if not messages:
        raise ValueError("nothing in it is supervised: every answer's weight is 0")
    return conversation


def parse_prompt(record: Mapping[str, Any]) -> Conversation:
    """Return the messages that a model is to answer: a conversation without its last answer.

    A record may hold ``prompt``, a user's text or a list of messages, instead of a conversation.
    ShareGPT's ``conversations`` are whole conversations, of which the last answer is made anew.
    Raises ``ValueError`` saying what is wrong.
    """
    prompt = record.get("prompt")
    if not is_absent(prompt):
        if isinstance(prompt, str) and prompt.strip():
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, list):
            raise ValueError("'prompt' is neither a text nor a list of messages")
        rest = {
            name: value for name, value in record.items() if name not in ("prompt", *CHAT_NAMES)
        }
        record = {**rest, "messages": prompt}
    elif not is_chat(record):
        raise ValueError("has neither a 'prompt' text nor a list of 'messages'")
    conversation = _parse(record)
    messages = conversation.messages
    answered = any(message.role == "assistant" for message in messages)
    if not answered and is_absent(record.get("messages")):
        raise ValueError("no answer in 'conversations' to make anew; 'messages' may lack one")
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not any(message.role == "user" for message in messages):
        raise ValueError("nothing to answer in it")
    return conversation


def _parse(record: Mapping[str, Any]) -> Conversation:
    refuse_media(record, "beside the conversation")
    entries = first_of(record, CHAT_NAMES)
    if isinstance(entries, str):
        entries = parse_json(entries, "the conversation")
    if not isinstance(entries, list):
        raise ValueError("the conversation is empty")
    messages = [parse_message(entry, number) for number, entry in enumerate(entries, start=1)]
    messages, openings = _without_opening(messages)
    _check_order(messages)
    messages = _with_system(messages, record)
    return Conversation(
        messages,
        _tools(messages, record),
        _variables(record),
        openings,
        tuple(key for key, value in record.items() if key not in _READ and not is_absent(value)),
    )


def _without_opening(messages: list[Message]) -> tuple[list[Message], int]:
    """Return ``messages`` without those before the first user's, if an answer opens them, and how
    many answers that leaves out."""
    first = next((i for i, m in enumerate(messages) if m.role not in ("system", "developer")), 0)
    if messages[first].role != "assistant":
        return messages, 0
    user = next((i for i, m in enumerate(messages) if m.role == "user"), len(messages))
    left_out = sum(message.role == "assistant" for message in messages[first:user])
    return messages[:first] + messages[user:], left_out


def _check_order(messages: list[Message]) -> None:
    """Raise ``ValueError`` for an order that no server generates; templates may refuse more."""
    previous = ""
    for message in messages:
        role = message.role
        after = f"after {previous!r}" if previous else "at the start"
        result = role == "tool" and previous not in ("assistant", "tool")
        if result or (role == "assistant" and previous == "assistant"):
            raise ValueError(f"message {message.number}: roles out of order: {role!r} {after}")
        previous = role


def _with_system(messages: list[Message], record: Mapping[str, Any]) -> list[Message]:
    """Return ``messages`` with the system prompt that stands beside them in front."""
    text = first_of(record, _SYSTEM_NAMES)
    if text is None:
        return messages
    system = parse_message({"role": "system", "content": text}, 0)
    if messages and messages[0].role in ("system", "developer"):
        if messages[0].content.strip() != system.content.strip():
            raise ValueError("the system prompt beside the conversation differs from the one in it")
        return messages
    return [system, *messages]


def _tools(messages: list[Message], record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools beside the conversation or in its system message, which lose them there."""
    holders = [{k: v for k, v in record.items() if k in _TOOL_NAMES}]
    for index, message in enumerate(messages):
        names = [name for name in _TOOL_NAMES if name in message.fields]
        if message.role in ("system", "developer") and names:
            holders.append({name: message.fields[name] for name in names})
            rest = {k: v for k, v in message.fields.items() if k not in names}
            messages[index] = replace(message, fields=rest)
    lists = [
        tool_list(without_nulls(value), name)
        for holder in holders
        for name, value in holder.items()
        if not is_absent(value)
    ]
    lists = [tools for tools in lists if tools]
    if any(tools != lists[0] for tools in lists):
        raise ValueError("the record holds two lists of tools, which differ")
    return lists[0] if lists else None


def _variables(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's variables that the record sets, for itself alone."""
    variables = record.get("chat_template_kwargs")
    if isinstance(variables, str) and variables:
        variables = parse_json(variables, "'chat_template_kwargs'")
    if is_absent(variables):
        variables = {}
    if not isinstance(variables, dict) or RESERVED & set(variables):
        raise ValueError("'chat_template_kwargs' is not an object of a template's own variables")
    variables = without_nulls(variables)
    for name, kind in _VARIABLES.items():
        value = record.get(name)
        if is_absent(value):
            continue
        if not isinstance(value, kind):
            raise ValueError(f"{name!r} must be of type {kind.__name__}, not {value!r}")
        if variables.setdefault(name, value) != value:
            raise ValueError(f"{name!r} differs from 'chat_template_kwargs'")
    return variables
