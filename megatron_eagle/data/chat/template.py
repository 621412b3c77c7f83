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

What a conversation says and its rendering lacks is refused or counted (``held.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_eagle.data.chat import held
from megatron_eagle.data.chat.conversations import Conversation
from megatron_eagle.data.chat.dialect import Dialect
from megatron_eagle.data.chat.messages import Message
from megatron_eagle.data.chat.notes import (
    OPENINGS,
    THOUGHTS_CUT,
    THOUGHTS_CUT_EARLIER,
    THOUGHTS_UNREAD,
    TOOLS_LEFT_OUT,
    UNENDED,
    UNREAD,
    UNSTABLE_TURNS,
)
from megatron_eagle.data.chat.rendering import Renderer, Span
from megatron_eagle.data.chat.turns import answer_turn

_SHAPES = 10_000
"""Shapes of conversations that are remembered; those of long agents' ones hardly recur."""


@dataclass
class RenderedSample:
    """A text and the character spans [start, end) of it that the model generated.

    ``marked``: the template marked the spans itself. Otherwise a span ends with the text that the
    template puts after an answer, of which the model generates the end-of-turn token only.
    """

    text: str
    spans: list[Span]
    marked: bool = False


@dataclass
class _Sample:
    """A text and where in it each answer lies, by the index of its message."""

    text: str
    answers: dict[int, Span] = field(default_factory=dict)


class ChatTemplate:
    """Jinja chat template with the variables it is always rendered with.

    ``special`` and ``ends`` are the tokenizer's special tokens and those that end an answer.
    ``counts`` says what was rendered otherwise than the conversations say.
    """

    def __init__(
        self,
        source: str,
        names: dict[str, str],
        options: dict[str, Any],
        special: Collection[str] = (),
        ends: Collection[str] = (),
    ) -> None:
        self._renderer = Renderer(source, names, options)
        self.dialect = Dialect(self._renderer, special, ends)
        self.counts: Counter[str] = Counter()
        self._short_texts: dict[Any, str | None] = {}

    def samples(self, conversation: Conversation) -> list[RenderedSample]:
        """Return samples that together hold every assistant message once, in order.

        Raises ``ValueError`` when the template refuses the conversation, when an answer changes the
        text before it, or when a message's text or call is left out.
        """
        counts = self._counted(conversation)
        if self._renderer.marks_generation:
            samples = [self._marked(conversation, counts)]
        else:
            rendered = self._rendered(conversation, counts)
            self._check(conversation, rendered, counts)
            samples = [self._ended(sample, conversation, counts) for sample in rendered[::-1]]
        self.counts.update(counts)
        return samples

    def prompt(self, conversation: Conversation) -> str:
        """Return the text that a server sends for ``conversation``, the generation prompt included.

        Raises ``ValueError`` as ``samples`` does.
        """
        counts = self._counted(conversation)
        text = self._render(conversation, True)
        held.check_context(text, conversation.messages)
        self._check_short(
            conversation, lambda it: held.check_context(self._render(it, True), it.messages)
        )
        self._count_tools(conversation, text, counts)
        self.counts.update(counts)
        return text

    def _render(self, conversation: Conversation, generation_prompt: bool = False) -> str:
        forms = [self.dialect.form(message) for message in conversation.messages]
        tools, variables = conversation.tools, conversation.variables
        return self._renderer.render(forms, tools, variables, generation_prompt)[0]

    def _rendered(self, conversation: Conversation, counts: Counter[str]) -> list[_Sample]:
        """Return the samples, the one of the longest text first."""
        forms = [self.dialect.form(message) for message in conversation.messages]

        def render(messages: list[dict[str, Any]], generation_prompt: bool = False) -> str:
            tools, variables = conversation.tools, conversation.variables
            return self._renderer.render(messages, tools, variables, generation_prompt)[0]

        samples: list[_Sample] = []
        last = len(forms) - 1
        for index in range(last, -1, -1):
            message = conversation.messages[index]
            if message.role != "assistant" or not message.supervised:
                continue
            text, start = answer_turn(render, forms[:index], forms[index], message.number)
            sample = next((s for s in samples if s.text.startswith(text)), None)
            if sample is None:
                counts[UNSTABLE_TURNS] += bool(samples)
                sample = _Sample(text)
                samples.append(sample)
            sample.answers[index] = (start, len(text))
        return samples

    def _check(
        self, conversation: Conversation, samples: list[_Sample], counts: Counter[str]
    ) -> None:
        _check_texts(conversation, samples)
        self._check_short(conversation, lambda it: _check_texts(it, self._rendered(it, Counter())))
        for sample in samples:
            for index, span in sample.answers.items():
                message = conversation.messages[index]
                if held.thinks(message) and not held.holds_thought(sample.text, message, *span):
                    counts[self._cut(message)] += 1
        self._count_tools(conversation, samples[0].text, counts)

    def _cut(self, message: Message) -> str:
        unread = message.thought and self.dialect.thought_name is None
        return THOUGHTS_UNREAD if unread else THOUGHTS_CUT

    def _ended(
        self, sample: _Sample, conversation: Conversation, counts: Counter[str]
    ) -> RenderedSample:
        """Return ``sample`` with spans that include the token that ends an answer.

        Where only the next turn says it, the one after the last answer is appended.
        """
        text, spans = sample.text, sorted(sample.answers.items())
        if self.dialect.closes_answers:
            return RenderedSample(text, [span for _, span in spans])
        ended = []
        for index, (start, end) in spans:
            if end == len(sample.text):
                token = self.dialect.opener(bool(conversation.messages[index].calls))
                text += token
            else:
                token = self.dialect.leading_end(text[end:])
            counts[UNENDED] += not token
            ended.append((start, end + len(token)))
        return RenderedSample(text, ended)

    def _marked(self, conversation: Conversation, counts: Counter[str]) -> RenderedSample:
        messages = conversation.messages
        forms = [self.dialect.form(message) for message in messages]
        text, spans = self._renderer.render(
            forms, conversation.tools, conversation.variables, mark=True
        )
        held.check_context(text, messages)
        self._check_short(
            conversation, lambda it: held.check_context(self._render(it), it.messages)
        )
        answers = [message for message in messages if message.role == "assistant"]
        one_each = len(spans) == len(answers)
        for place, answer in enumerate(answers):
            span = spans[place] if one_each else (0, len(text))
            if held.thinks(answer) and not held.holds_thought(text, answer, *span):
                earlier = answer is not answers[-1] and self.dialect.thought_name is not None
                counts[THOUGHTS_CUT_EARLIER if earlier else self._cut(answer)] += 1
        if not all(answer.supervised for answer in answers):
            if not one_each:
                raise ValueError(
                    f"an answer has weight 0, but the chat template marks {len(spans)} spans of "
                    f"{len(answers)} answers, so which one is meant is not known"
                )
            spans = [s for s, answer in zip(spans, answers, strict=True) if answer.supervised]
        self._count_tools(conversation, text, counts)
        return RenderedSample(text, spans, marked=True)

    def _counted(self, conversation: Conversation) -> Counter[str]:
        counts: Counter[str] = Counter()
        counts[OPENINGS] += bool(conversation.openings)
        names = [*conversation.unread]
        for message in conversation.messages:
            names += self.dialect.unread(message)
        counts.update(UNREAD + name for name in set(names))
        return counts

    def _count_tools(self, conversation: Conversation, text: str, counts: Counter[str]) -> None:
        if conversation.tools is not None:
            read = "tools" in self._renderer.words and held.holds_tools(text, conversation.tools)
            counts[TOOLS_LEFT_OUT] += not read

    def _check_short(self, conversation: Conversation, check: Any) -> None:
        """Raise ``ValueError`` if the template leaves out a text too short to be searched for.

        A rendering may hold "yes" by chance. So ``check`` is given the conversation with a word of
        its own for every text; once per shape of conversation, for what a template leaves out
        depends on roles and fields.
        """
        messages = conversation.messages
        if not any(0 < len(message.content.strip()) < held.SHORT for message in messages):
            return
        shape = (
            tuple(map(_shape, messages)),
            bool(conversation.tools),
            repr(conversation.variables),
        )
        if shape not in self._short_texts:
            if len(self._short_texts) == _SHAPES:
                self._short_texts.clear()
            self._short_texts[shape] = _complaint(check, _with_words(conversation))
        complaint = self._short_texts[shape]
        if complaint is not None:
            raise ValueError(complaint)


def _check_texts(conversation: Conversation, samples: list[_Sample]) -> None:
    """Raise ``ValueError`` naming a message whose text or calls the samples lack: an answer's where
    it is supervised, another's in the longest text."""
    answers = {index for sample in samples for index in sample.answers}
    others = [m for i, m in enumerate(conversation.messages) if i not in answers]
    held.check_context(samples[0].text, others)
    for sample in samples:
        for index, (start, end) in sample.answers.items():
            held.check_answer(sample.text, conversation.messages[index], start, end)


def _shape(message: Message) -> tuple[Any, ...]:
    said, thought = bool(message.content.strip()), bool(message.thought)
    fields, calls = tuple(message.fields), len(message.calls)
    return message.role, message.number, said, thought, calls, message.supervised, fields


def _with_words(conversation: Conversation) -> Conversation:
    """Return ``conversation`` with another word for every text, and calls without arguments."""
    messages = []
    for index, message in enumerate(conversation.messages):
        calls = tuple(replace(call, arguments={}, text="{}") for call in message.calls)
        word = f"zq{index}zq" if message.content.strip() else message.content
        messages.append(replace(message, content=word, calls=calls))
    return replace(conversation, messages=messages)


def _complaint(check: Any, conversation: Conversation) -> str | None:
    """Return what ``check`` says against ``conversation``; None for nothing that is left out."""
    try:
        check(conversation)
    except held.LeftOut as error:
        return str(error)
    except ValueError:
        return None  # the template refuses such words, which says nothing about the texts
    return None
