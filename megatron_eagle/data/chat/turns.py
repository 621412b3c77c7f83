"""Where an answer begins in the rendering of its turn, for templates that do not mark it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Form = dict[str, Any]
Render = Callable[..., str]
"""Renders messages, with the generation prompt if the second argument is true."""


def answer_turn(render: Render, before: list[Form], answer: Form, number: int) -> tuple[str, int]:
    """Return the text up to the end of ``answer``, which follows ``before``, and where it begins.

    Raises ``ValueError`` naming message ``number`` when the answer changes the text before it.
    """
    prompt = render(before, True)
    turn = render([*before, answer])
    if turn.startswith(prompt) and prompt != render(before):
        return turn, len(prompt)
    header = _header(render, before)
    if turn.startswith(prompt):
        # This template has no generation prompt. The header of a turn is not generated, but a
        # space after it is part of the answer's first token.
        written = turn.startswith(header) and header[len(prompt) :].strip()
        return turn, len(header) if written else len(prompt)
    if not turn.startswith(header):
        raise ValueError(
            f"message {number}: with this answer the chat template renders the text before it "
            "differently (because of thinking, with enable_thinking false?), so no prefix of the "
            "text is its prompt; mark the answer with {% generation %} in the template"
        )
    if prompt.startswith(header):
        return turn, len(header)  # the prompt opens a block (thinking) that history omits
    # The prompt differs from the history: append the answer to the prompt.
    space = _trailing_space(header).removeprefix(_trailing_space(prompt))
    return prompt + turn[len(header) - len(space) :], len(prompt)


def _header(render: Render, before: list[Form]) -> str:
    """Return the part of a rendered turn before its answer, which no answer changes.

    It is the common prefix of the turn's renderings with two answers that differ in their first
    character.
    """
    one, other = (render([*before, {"role": "assistant", "content": word}]) for word in ("a", "b"))
    same = (i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y)
    return one[: next(same, 0)]


def _trailing_space(text: str) -> str:
    return text[len(text.rstrip()) :]
