"""How one chat template wants its messages: found by rendering small conversations with it.

Templates agree about ``role`` and ``content``. Under which name they read thinking, whether the
arguments of a call are an object or a text, and which token ends an answer differs, and what a
template does not read it leaves out without a word.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cached_property
from typing import Any

from megatron_eagle.data.chat.messages import THOUGHT_NAMES, Call, Message
from megatron_eagle.data.chat.rendering import Renderer

PARTS = "content"
"""Name under which a template reads thinking that wants it as a part of the content."""

_THOUGHT, _TEXT, _KEY, _VALUE = "zqthought", "zqtext", "zqkey", "zqvalue"
_CALL = Call("zqname", {_KEY: _VALUE}, f'{{"{_KEY}": "{_VALUE}"}}', {"id": "zqcall0id"})
_USER = {"role": "user", "content": "zquser"}
_BOOKKEEPING = frozenset({"id", "type", "index"})
"""Fields of calls that say nothing of what was called."""
_DEVELOPER = re.compile(r"""['"]developer['"]""")


class Dialect:
    """What the template of ``renderer`` reads.

    ``special`` are the tokenizer's special tokens, and ``ends`` those that end an answer.
    """

    def __init__(
        self, renderer: Renderer, special: Collection[str] = (), ends: Collection[str] = ()
    ) -> None:
        self._renderer, self._special, self._ends = renderer, special, ends

    @cached_property
    def thought_name(self) -> str | None:
        """Return the field in which the template reads an answer's thinking; None if in none."""
        content: Any
        calls = [_call(_CALL, text=self.text_arguments)]
        for extra in ({}, {"tool_calls": calls, "content": ""}):
            for name in THOUGHT_NAMES:
                answer = {"role": "assistant", "content": _TEXT, name: _THOUGHT, **extra}
                if _THOUGHT in self._try([_USER, answer]):
                    return name
        content = _parts(_THOUGHT, _TEXT)
        shown = self._try([_USER, {"role": "assistant", "content": content}])
        if _THOUGHT in shown and _TEXT in shown and not re.search(r"['\"]thinking['\"]:", shown):
            return PARTS
        named = (name for name in THOUGHT_NAMES if name in self._renderer.fields)
        return next(named, None)  # read under a condition that no answer above meets

    @cached_property
    def text_arguments(self) -> bool:
        """Return whether the template takes the arguments of a call as a text only."""
        as_object, as_text = (
            self._try([_USER, {"role": "assistant", "content": "", "tool_calls": [call]}])
            for call in (_call(_CALL, text=False), _call(_CALL, text=True))
        )
        if _VALUE in as_object and f"'{_KEY}'" not in as_object:
            return False
        return _VALUE in as_text and f'\\"{_KEY}' not in as_text

    @cached_property
    def _knows_developer(self) -> bool:
        return bool(_DEVELOPER.search(self._renderer.source))

    @cached_property
    def closes_answers(self) -> bool:
        """Return whether the template ends an answer by a special token itself.

        True as well if it cannot be found out.
        """
        turn = self._try([_USER, {"role": "assistant", "content": _TEXT}])
        end = turn.rpartition(_TEXT)[2]
        return _TEXT not in turn or any(token in end for token in self._special)

    def opener(self, after_call: bool) -> str:
        """Return what ends an answer where only the next turn's opening says it, or "".

        GLM's models end an answer by saying ``<|user|>``, or ``<|observation|>`` after a call.
        """
        return self._openers[after_call]

    @cached_property
    def _openers(self) -> tuple[str, str]:
        call = [_call(_CALL, text=self.text_arguments)]
        answer: dict[str, Any] = {"role": "assistant", "content": _TEXT}
        result = {"role": "tool", "content": _TEXT, "tool_call_id": "zqcall0id", "name": "zqname"}
        after_text = self._opening([_USER, answer], _USER)
        after_call = self._opening([_USER, {**answer, "tool_calls": call}], result)
        return after_text, after_call or after_text

    def _opening(self, messages: list[dict[str, Any]], reply: dict[str, Any]) -> str:
        turn, longer = self._try(messages), self._try([*messages, reply])
        return self.leading_end(longer[len(turn) :]) if longer.startswith(turn) else ""

    def leading_end(self, text: str) -> str:
        """Return the beginning of ``text`` if it is a token that ends an answer, space included."""
        bare = text.lstrip()
        end = next((token for token in self._ends if bare.startswith(token)), "")
        return text[: len(text) - len(bare)] + end if end else ""

    def form(self, message: Message) -> dict[str, Any]:
        """Return ``message`` as the template wants it.

        Raises ``ValueError`` naming it if it wants arguments as an object that are none.
        """
        role = message.role
        if role == "developer" and not self._knows_developer:
            role = "system"
        form: dict[str, Any] = {"role": role, "content": message.content, **message.fields}
        if message.thought and self.thought_name == PARTS:
            form["content"] = _parts(message.thought, message.content)
        elif message.thought and self.thought_name is not None:
            form[self.thought_name] = message.thought
        if message.calls:
            form["tool_calls"] = [_call(call, self.text_arguments) for call in message.calls]
            if not self.text_arguments:
                _check_objects(message)
        return form

    def unread(self, message: Message) -> list[str]:
        """Return the names of the further fields of the message and its calls that the template
        does not read."""
        own = [name for name in message.fields if name not in self._renderer.fields]
        further = {name for call in message.calls for name in (*call.outer, *call.inner)}
        return own + sorted(further - _BOOKKEEPING - self._renderer.fields)

    def _try(self, messages: list[dict[str, Any]]) -> str:
        """Return the rendering of ``messages``, or "" if the template refuses them."""
        try:
            return self._renderer.render(messages)[0]
        except ValueError:
            return ""


def _call(call: Call, text: bool) -> dict[str, Any]:
    arguments: Any = call.text if text else call.arguments
    function = {"name": call.name, "arguments": arguments, **call.inner}
    return {"type": "function", **call.outer, "function": function}


def _parts(thought: str, text: str) -> list[dict[str, str]]:
    return [{"type": "thinking", "thinking": thought}, {"type": "text", "text": text}]


def _check_objects(message: Message) -> None:
    for call in message.calls:
        if call.arguments is None:
            raise ValueError(
                f"message {message.number}: the arguments of call {call.name!r} are no JSON "
                f"object, which the chat template wants: {call.text[:40]!r}"
            )
