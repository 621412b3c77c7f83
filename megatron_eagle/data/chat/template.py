"""Rendering of conversations with the exact spans that the model generates, for any chat template.

A template with ``{% generation %}`` blocks marks the spans itself. Any other template is rendered
turn by turn: once with the messages before an answer and the generation prompt (a server sends
this), and once with the answer as well; the rest of the second text after the first is the model's
answer, end of turn included. Texts are compared from their start; an answer is never searched for.

Some templates render a turn differently once the conversation continues: Qwen3 removes the thinking
of earlier turns, Mistral moves the system prompt to the last user message. Such a turn becomes a
training sample of its own, as server and model saw it; a turn whose text is a prefix of a longer
rendering shares that sample. So a stable template gives one sample per conversation, and no
template gives a context that does not occur in serving.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from megatron_eagle.data.chat.conversations import Conversation, Message
from megatron_eagle.data.chat.time_limit import time_limit
from megatron_eagle.user_files import first_line

Span = tuple[int, int]

RENDER_SECONDS = 60.0
"""Time for one rendering, after which a template is taken for one that never ends."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class RenderedSample:
    """A text and the character spans [start, end) of it that the model generated.

    ``marked``: the template marked the spans itself. Otherwise a span ends with the text that the
    template puts after an answer, of which the model generates the end-of-turn token only.
    """

    text: str
    spans: list[Span]
    marked: bool = False


class ChatTemplate:
    """Jinja chat template with the variables it is always rendered with.

    ``unstable_turns`` counts the turns that the rendering of the whole conversation shows
    differently than the model saw them.
    """

    def __init__(self, source: str, names: dict[str, str], options: dict[str, Any]) -> None:
        self.source, self.variables = source, {**names, **options}
        self.marks_generation = bool(_GENERATION.search(source))
        self.unstable_turns = 0

    def samples(self, conversation: Conversation) -> list[RenderedSample]:
        """Return samples that together hold every assistant message once, in order.

        Raises ``ValueError`` when the template refuses the conversation, or when an answer changes
        the text before it.
        """
        if self.marks_generation:
            return [self._marked(conversation)]
        samples: list[RenderedSample] = []
        last = len(conversation.messages) - 1
        for index in range(last, -1, -1):  # the longest rendering first
            if conversation.messages[index]["role"] != "assistant":
                continue
            text, start = self._turn(conversation, index)
            longer = next((s for s in samples if s.text.startswith(text)), None)
            if longer is None:
                self.unstable_turns += index != last
                samples.append(RenderedSample(text, [(start, len(text))]))
            else:
                longer.spans.insert(0, (start, len(text)))
        return samples[::-1]

    def render(
        self, messages: list[Message], tools: list[Any] | None, generation_prompt: bool = False
    ) -> str:
        """Render ``messages``; raise ``ValueError`` with the template's own words if it refuses."""
        return self._render(messages, tools, generation_prompt, False)[0]

    def _turn(self, conversation: Conversation, index: int) -> tuple[str, int]:
        """Return the text up to the end of the answer ``messages[index]``, and where it begins."""
        before, tools = conversation.messages[:index], conversation.tools
        prompt = self.render(before, tools, generation_prompt=True)
        turn = self.render([*before, conversation.messages[index]], tools)
        if turn.startswith(prompt) and prompt != self.render(before, tools):
            return turn, len(prompt)
        header = self._header(before, tools)
        if turn.startswith(prompt):
            # This template has no generation prompt. The header of a turn is not generated, but a
            # space after it is part of the answer's first token.
            written = turn.startswith(header) and header[len(prompt) :].strip()
            return turn, len(header) if written else len(prompt)
        if not turn.startswith(header):
            raise ValueError(
                f"message {index + 1}: with this answer the chat template renders the text before "
                "it differently (because of thinking, with enable_thinking false?), so no prefix "
                "of the text is its prompt; mark the answer with {% generation %} in the template"
            )
        if prompt.startswith(header):
            return turn, len(header)  # the prompt opens a block (thinking) that history omits
        # The prompt differs from the history: append the answer to the prompt.
        space = _trailing_space(header).removeprefix(_trailing_space(prompt))
        return prompt + turn[len(header) - len(space) :], len(prompt)

    def _header(self, before: list[Message], tools: list[Any] | None) -> str:
        """Return the part of a rendered turn before its answer, which no answer changes.

        It is the common prefix of the turn's renderings with two answers that differ in their first
        character.
        """
        one, other = [
            self.render([*before, {"role": "assistant", "content": word}], tools)
            for word in ("a", "b")
        ]
        same = (i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y)
        return one[: next(same, 0)]

    def _marked(self, conversation: Conversation) -> RenderedSample:
        text, spans = self._render(conversation.messages, conversation.tools, False, True)
        return RenderedSample(text, spans, marked=True)

    def _render(
        self, messages: list[Message], tools: list[Any] | None, generation_prompt: bool, mark: bool
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with time_limit(RENDER_SECONDS):
                rendered: Any = render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=self.source,
                    return_assistant_tokens_mask=mark,
                    add_generation_prompt=generation_prompt,
                    **self.variables,
                )
        except Exception as error:  # a template is a program, and fails like one
            reason = first_line(error) or type(error).__name__
            raise ValueError(f"the chat template fails: {reason}") from error
        texts, spans = rendered
        return texts[0], [(start, end) for start, end in spans[0]] if mark else []


def _trailing_space(text: str) -> str:
    return text[len(text.rstrip()) :]
