"""Rendering by a chat template, which is a stranger's program: in a sandbox, for a limited time.

transformers' own Jinja environment renders, so that the text is the one that servers make.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from types import FrameType
from typing import Any

Span = tuple[int, int]

SECONDS = 10.0
"""Processor time that one rendering may take; the longest conversations take a hundredth of it."""
RESERVED = frozenset(
    {"conversations", "messages", "tools", "chat_template", "add_generation_prompt"}
    | {"return_assistant_tokens_mask", "continue_final_message"}
)
"""Names of variables that a conversation and its rendering give the template."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_WORD = re.compile(r"[A-Za-z_]\w*")
_FIELD = re.compile(r"""\.\s*([A-Za-z_]\w*)|(['"])([A-Za-z_]\w*)\2""")
_LONGEST_REASON = 200


class Renderer:
    """Jinja chat template with the variables it is always rendered with."""

    def __init__(self, source: str, names: dict[str, str], options: dict[str, Any]) -> None:
        self.source, self.variables = source, {**names, **options}
        self.marks_generation = bool(_GENERATION.search(source))

    @cached_property
    def words(self) -> frozenset[str]:
        """Return every word in the template; a variable that is not among them is not read."""
        return frozenset(_WORD.findall(self.source))

    @cached_property
    def fields(self) -> frozenset[str]:
        """Return the names that the template may look up in an object, ``.name`` or ``'name'``; a
        message's field that is not among them is not read."""
        return frozenset(attribute or key for attribute, _, key in _FIELD.findall(self.source))

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None = None,
        variables: dict[str, Any] | None = None,
        generation_prompt: bool = False,
        mark: bool = False,
    ) -> tuple[str, list[Span]]:
        """Return the text and, with ``mark``, the spans inside ``{% generation %}`` blocks.

        ``variables`` replace those of the same names. Raises ``ValueError`` with the template's own
        words if it refuses, fails in any way, or takes more than ``SECONDS``.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _time_limit(SECONDS):
                rendered: Any = render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=self.source,
                    return_assistant_tokens_mask=mark,
                    add_generation_prompt=generation_prompt,
                    **{**self.variables, **(variables or {})},
                )
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"the chat template fails: {lines[0][:_LONGEST_REASON]}") from error
        texts, spans = rendered
        return texts[0], [(start, end) for start, end in spans[0]] if mark else []


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` inside once it has taken ``seconds`` of this process's processor time.

    Only a process's main thread can be interrupted; in another there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _handle_the_alarm()
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@cache
def _handle_the_alarm() -> None:
    """Turn this process's SIGVTALRM into an exception: once, for it costs more than a timer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it does not end ({SECONDS:g} s of processor time)")

    signal.signal(signal.SIGVTALRM, stop)
