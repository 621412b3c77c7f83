"""Words for what was rendered otherwise than the records say, by the names of its counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

UNSTABLE_TURNS = "unstable_turns"
OPENINGS = "conversations_without_their_opening_answers"
THOUGHTS_UNREAD = "thoughts_without_a_name_in_the_template"
THOUGHTS_CUT = "thoughts_cut_from_answers"
THOUGHTS_CUT_EARLIER = "thoughts_cut_from_earlier_answers"
TOOLS_LEFT_OUT = "conversations_without_their_tools"
UNENDED = "answers_without_an_end_token"
UNREAD = "unread_field:"
"""Names of what is counted; the last one is followed by a field's name."""

_WORDS = {
    UNSTABLE_TURNS: "the chat template is not prefix-stable: {} earlier turns are rendered "
    "differently once the conversation continues (thinking or a system prompt moves); each became "
    "a document of its own, as the model saw it",
    OPENINGS: "{} bad lines mended: what the assistant says before the first question was left out",
    THOUGHTS_UNREAD: "{} answers are taught without their thinking: the chat template reads it "
    "under none of its names",
    THOUGHTS_CUT: "{} answers are taught without their thinking: the chat template cuts it out of "
    "an answer even where it is the last one",
    THOUGHTS_CUT_EARLIER: "{} answers are taught without their thinking: the chat template cuts it "
    "out of answers that others follow, and marks with {{% generation %}} what is left of them",
    TOOLS_LEFT_OUT: "the tools of {} conversations are left out by the chat template",
    UNENDED: "{} answers end without a token that ends them, which the draft so does not learn: "
    "the chat template writes none, and the next turn does not begin with an end token of the "
    "tokenizer's directory (config.json, generation_config.json)",
}
_NAMED_FIELDS = 8


def notes(counts: Mapping[str, int]) -> Iterator[str]:
    """Yield a sentence for each of ``counts``, and one for all fields that nothing reads."""
    for name, words in _WORDS.items():
        if counts.get(name):
            yield words.format(f"{counts[name]:,}")
    fields = [(-n, name.removeprefix(UNREAD)) for name, n in counts.items() if UNREAD in name]
    if fields:
        shown = ", ".join(f"{name} ({-n:,})" for n, name in sorted(fields)[:_NAMED_FIELDS])
        more = f" and {len(fields) - _NAMED_FIELDS} more" if len(fields) > _NAMED_FIELDS else ""
        yield f"fields that neither this command nor the chat template reads: {shown}{more}"
