"""What a model generates inside a rendered conversation, exact for any chat template.

A template that marks its own ``{% generation %}`` blocks is taken at its word. Any other one is
rendered turn by turn: with the messages before an answer and the generation prompt (what a server
sends), and with the answer as well; what the second has beyond the first is what the model said,
end of turn included. Texts are compared from their start; an answer is never searched for.

Templates differ by what follows a turn: Qwen3 takes the thinking out of earlier turns, Mistral
moves the system prompt to the last user message. Turns that such a template renders differently
later on are training samples of their own, each as the server and the model saw it; turns whose
text the longer rendering starts with share it. So a stable template gives one sample a
conversation, and no template gives a context that serving would not show.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from megatron_eagle.data.chat.conversations import Conversation, Message

Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class RenderedSample:
    """A text and the character spans [start, end) of it that the model generated.

    ``marked`` spans are the template's own; the others end with what the template puts after an
    answer, of which only the end-of-turn token is the model's.
    """

    text: str
    spans: list[Span]
    marked: bool = False


class ChatTemplate:
    """A Jinja chat template with the names and options it is always rendered with.

    ``unstable_turns`` counts the turns that the whole conversation's rendering does not show as
    the model saw them.
    """

    def __init__(self, source: str, names: dict[str, str], options: dict[str, Any]) -> None:
        self.source, self.variables = source, {**names, **options}
        self.marks_generation = bool(_GENERATION.search(source))
        self.unstable_turns = 0

    def samples(self, conversation: Conversation) -> list[RenderedSample]:
        """Every assistant message of the conversation in exactly one sample, in their order.

        Raises ``ValueError`` when the template refuses the conversation, and when it lets an
        answer change what stands before it.
        """
        if self.marks_generation:
            return [self._marked(conversation)]
        samples: list[RenderedSample] = []
        last = len(conversation.messages) - 1
        for index in range(last, -1, -1):  # the longest rendering first
            if conversation.messages[index]["role"] != "assistant":
                continue
            text, start = self._turn(conversation, index)
            whole = next((s for s in samples if s.text.startswith(text)), None)
            if whole is None:
                self.unstable_turns += index != last
                samples.append(RenderedSample(text, [(start, len(text))]))
            else:
                whole.spans.insert(0, (start, len(text)))
        return samples[::-1]

    def render(
        self, messages: list[Message], tools: list[Any] | None, generation_prompt: bool = False
    ) -> str:
        """The text of ``messages``; ``ValueError`` with the template's own words if it refuses."""
        return self._render(messages, tools, generation_prompt, False)[0]

    def _turn(self, conversation: Conversation, index: int) -> tuple[str, int]:
        """(text up to the end of the answer ``messages[index]``, where the model began)."""
        before, tools = conversation.messages[:index], conversation.tools
        prompt = self.render(before, tools, generation_prompt=True)
        turn = self.render([*before, conversation.messages[index]], tools)
        if turn.startswith(prompt) and prompt != self.render(before, tools):
            return turn, len(prompt)
        header = self._header(before, tools)
        if turn.startswith(prompt):
            # No generation prompt in this template: a header that it writes is not the model's,
            # a space is part of the answer's first token.
            written = turn.startswith(header) and header[len(prompt) :].strip()
            return turn, len(header) if written else len(prompt)
        if not turn.startswith(header):
            raise ValueError(
                f"message {index + 1}: the chat template renders what is before this answer by "
                "what is in it (thinking, with --thinking off?), so no prefix of the text is its "
                "prompt; mark the answer with {% generation %} in the template"
            )
        if prompt.startswith(header):
            return turn, len(header)  # the prompt opens a block (thinking) that history lacks
        # The prompt is another one than the history shows: what the model said, put after it.
        own_space = _trailing_space(header).removeprefix(_trailing_space(prompt))
        return prompt + turn[len(header) - len(own_space) :], len(prompt)

    def _header(self, before: list[Message], tools: list[Any] | None) -> str:
        """The part of a rendered turn that no answer changes: what the turn's rendering with two
        answers that differ from their first character on has in common."""
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
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=mark,
                add_generation_prompt=generation_prompt,
                **self.variables,
            )
        except (TemplateError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"the chat template fails: {error}") from error
        texts, spans = rendered
        return texts[0], [(start, end) for start, end in spans[0]] if mark else []


def _trailing_space(text: str) -> str:
    return text[len(text.rstrip()) :]
