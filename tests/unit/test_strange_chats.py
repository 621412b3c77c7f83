"""Chats as other tools write them: what a record says reaches the model, or somebody is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from megatron_eagle.data.chat import notes, rendering
from megatron_eagle.data.chat.conversations import parse_conversation, parse_prompt
from megatron_eagle.data.chat.masked_tokens import mask_tokens
from megatron_eagle.data.chat.template import ChatTemplate
from megatron_eagle.data.chat.tokenizer import load_tokenizer
from tests.helpers import agent_templates as agents
from tests.helpers import chat_templates as templates

USER = {"role": "user", "content": "What is the weather in Paris?"}
ANSWER = {"role": "assistant", "content": "It is sunny."}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {
    "id": "functions.weather:0",
    "function": {"name": "weather", "arguments": {"city": "Paris"}},
}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "functions.weather:0"}
AGENT = [USER, CALLED, RESULT, ANSWER]
ALL = {
    "llama3.1": agents.LLAMA31,
    "qwen3": templates.QWEN3,
    "glm4.5": agents.GLM45,
    "deepseek3.1": agents.DEEPSEEK31,
    "gpt-oss": agents.GPT_OSS,
    "kimi-k2": agents.KIMI_K2,
}
every_template = pytest.mark.parametrize("template", ALL.values(), ids=ALL)

Taught = Callable[..., tuple[list[tuple[str, list[str]]], dict[str, int]]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(templates.make_tokenizer(folder, more_special=agents.SPECIAL))


@pytest.fixture
def taught(tokenizer: Any) -> Taught:
    """[(text, supervised runs)] of a record's samples, and what was counted."""

    def run(template: str, record: Any, ends: Any = (), **options: Any) -> Any:
        record = {"messages": record} if isinstance(record, list) else record
        special = [tokenizer.decode([i]) for i in tokenizer.special_ids]
        chat = ChatTemplate(template, tokenizer.names, options, special, ends)
        samples = []
        for sample in chat.samples(parse_conversation(record)):
            document, runs, inside = mask_tokens(sample, tokenizer), [], False
            for token, supervised in zip(document.ids.tolist(), document.mask, strict=True):
                if supervised and not inside:
                    runs.append([])
                if supervised:
                    runs[-1].append(token)
                inside = bool(supervised)
            samples.append((sample.text, [tokenizer.decode(run) for run in runs]))
        return samples, {name: n for name, n in chat.counts.items() if n}

    return run


@every_template
@pytest.mark.parametrize("nothing", [None, [], ""], ids=["null", "list", "text"])
def test_a_field_that_holds_nothing_is_an_absent_field(
    template: str, nothing: Any, taught: Taught
) -> None:
    names = ["tool_calls", "reasoning_content", "thinking", "reasoning", "name", "tool_call_id"]
    names += ["function_call", "weight", "train", "loss_mask", "images"]
    filled = [{**dict.fromkeys(names, nothing), **message} for message in (USER, ANSWER)]
    for entry in filled:
        entry |= {"from": None, "value": None}
    record = {"messages": filled, "tools": nothing, "system": nothing, "conversations": nothing}
    assert taught(template, record) == taught(template, [USER, ANSWER])


@every_template
def test_nulls_inside_calls_and_tools_are_absent_too(template: str, taught: Taught) -> None:
    call = {**CALL, "index": None, "function": {"name": "weather", "description": None,
            "arguments": {"city": "Paris", "unit": None}}}  # fmt: skip
    tools = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": None}}]
    chat = [USER, {**CALLED, "tool_calls": [call]}, RESULT, ANSWER]
    plain = taught(template, {"messages": AGENT, "tools": TOOLS})
    assert taught(template, {"messages": chat, "tools": tools}) == plain


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "think", "part"])
@pytest.mark.parametrize("template", [templates.QWEN3, agents.GLM45, agents.GPT_OSS, agents.PARTS])
def test_thinking_reaches_a_template_under_the_name_it_reads(
    template: str, name: str, taught: Taught
) -> None:
    answer: dict[str, Any] = {**ANSWER, name: "The user asks."}
    if name == "part":
        text = {"type": "text", "text": "It is sunny."}
        answer = {**ANSWER, "content": [{"type": "thinking", "thinking": "The user asks."}, text]}
    [(_, [spoken])], counts = taught(template, [USER, answer], agents.GLM_ENDS)
    assert spoken.count("The user asks.") == 1 and "It is sunny." in spoken
    assert not counts


def test_thinking_under_two_names_must_agree(taught: Taught) -> None:
    both = {**ANSWER, "reasoning": "Hm.", "reasoning_content": "Hm."}
    assert "Hm." in taught(templates.QWEN3, [USER, both])[0][0][1][0]
    with pytest.raises(ValueError, match="message 2: 'reasoning_content' and 'reasoning' differ"):
        taught(templates.QWEN3, [USER, {**both, "reasoning": "No."}])


def test_templates_that_cut_thinking_are_told_apart(taught: Taught) -> None:
    thoughtful = {**ANSWER, "reasoning": "Hm."}
    chat = [USER, {**thoughtful, "reasoning": "Well."}, USER, thoughtful]
    assert taught(templates.LLAMA3, chat)[1] == {notes.THOUGHTS_UNREAD: 2}
    assert taught(agents.KIMI_K2, chat)[1] == {notes.THOUGHTS_CUT: 2}
    assert taught(templates.QWEN3, chat)[1] == {notes.UNSTABLE_TURNS: 1}
    inline = [USER, {**ANSWER, "content": "<think>Hm.</think>It is sunny."}]
    assert taught(agents.DEEPSEEK31, inline)[1] == {notes.THOUGHTS_CUT: 1}
    marked = templates.QWEN3.replace(
        "{{- '<|im_start|>assistant\\n' }}\n{%- if loop", "{%- generation %}\n{%- if loop"
    ).replace("{{- '<|im_end|>\\n' }}\n{%- elif", "{%- endgeneration %}\n{%- elif")
    assert taught(marked, chat)[1] == {notes.THOUGHTS_CUT_EARLIER: 1}
    assert len(list(notes.notes({notes.THOUGHTS_CUT: 1, notes.UNREAD + "x": 3}))) == 2


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
@every_template
def test_a_system_prompt_beside_the_conversation_is_its_first_message(
    template: str, name: str, taught: Taught
) -> None:
    inside = [{"role": "system", "content": "Be brief."}, USER, ANSWER]
    assert taught(template, {name: "Be brief.", "messages": [USER, ANSWER]}) == taught(
        template, inside
    )
    assert taught(template, {name: "Be brief.", "messages": inside}) == taught(template, inside)
    with pytest.raises(ValueError, match="beside the conversation differs"):
        taught(template, {name: "Be long.", "messages": inside})


@pytest.mark.parametrize("off", [("weight", 0), ("train", False), ("loss_mask", 0.0)])
@pytest.mark.parametrize("template", [templates.QWEN25, templates.MARKED])
def test_an_answer_of_weight_zero_is_context(template: str, off: Any, taught: Taught) -> None:
    wrong = {"role": "assistant", "content": "It is fine.", off[0]: off[1]}
    [(text, spoken)], _ = taught(template, [USER, wrong, USER, {**ANSWER, "weight": 1}])
    assert spoken == ["It is sunny.<|im_end|>"] and "It is fine." in text
    [(text, spoken)], _ = taught(template, [USER, ANSWER, USER, wrong])
    assert spoken == ["It is sunny.<|im_end|>"] and "It is fine." not in text
    with pytest.raises(ValueError, match="every answer's weight is 0"):
        taught(template, [USER, wrong])
    with pytest.raises(ValueError, match=r"message 2: 'weight' is 0\.5"):
        taught(template, [USER, {**ANSWER, "weight": 0.5}])


@every_template
@pytest.mark.parametrize("as_text", [False, True])
def test_the_arguments_of_calls_go_in_as_the_template_wants(
    template: str, as_text: bool, taught: Taught
) -> None:
    arguments: Any = {"city": "Paris", "days": 3}
    call = {**CALL, "function": {"name": "weather",
            "arguments": json.dumps(arguments) if as_text else arguments}}  # fmt: skip
    samples, _ = taught(template, {"tools": TOOLS, "messages": [
        USER, {**CALLED, "tool_calls": [call]}, RESULT, ANSWER]})  # fmt: skip
    spoken = "".join(run for _, runs in samples for run in runs)
    assert '"city": "Paris"' in spoken or "<arg_key>city</arg_key>" in spoken
    assert '\\"' not in spoken and "{'" not in spoken


@pytest.mark.parametrize(
    "answer",
    [
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"name": "weather", "parameters": {"city": "Paris"}}]},
        {"tool_calls": [{"type": "tool_use", "name": "weather", "input": {"city": "Paris"}}]},
        {"function_call": json.dumps(CALL["function"])},
        {"role": None, "from": "function_call", "value": CALL["function"]},
    ],
    ids=["text", "parameters", "input", "function_call", "object"],
)
def test_calls_in_every_form_are_the_same_calls(answer: Any, taught: Taught) -> None:
    plain = taught(templates.QWEN25, AGENT)
    called = {"role": "assistant", "content": None, **answer}
    assert taught(templates.QWEN25, [USER, called, RESULT, ANSWER]) == plain


@pytest.mark.parametrize("nothing", [[], "", "null", {}, None])
def test_arguments_that_hold_nothing_are_none(nothing: Any, taught: Taught) -> None:
    called = {**CALLED, "tool_calls": [{"name": "weather", "arguments": nothing}]}
    [(_, [spoken, _])], _ = taught(templates.QWEN25, [USER, called, RESULT, ANSWER])
    assert '"arguments": {}' in spoken


def test_arguments_that_are_no_object_are_refused_where_one_is_wanted(taught: Taught) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": "in Paris"}}
    chat = [USER, {**CALLED, "tool_calls": [call]}]
    assert "weather<|sep|>in Paris" in taught(agents.DEEPSEEK31, chat)[0][0][0]
    with pytest.raises(ValueError, match="message 2: the arguments of call 'weather' are no JSON"):
        taught(templates.QWEN3, chat)


def test_the_next_turn_s_opener_is_supervised_where_it_ends_an_answer(taught: Taught) -> None:
    samples, _ = taught(
        agents.GLM45, [USER, {**ANSWER, "reasoning": "Hm."}, *AGENT], agents.GLM_ENDS
    )
    [(_, first), (text, later)] = samples
    assert first == ["\n<think>Hm.</think>\nIt is sunny.<|user|>"]
    assert later[0].endswith("</tool_call><|observation|>") and later[1].endswith("sunny.<|user|>")
    assert text.endswith("sunny.<|user|>")
    [(text, spoken)], counts = taught(agents.GLM45, [*AGENT[:2]], agents.GLM_ENDS)
    assert text.endswith("</tool_call><|observation|>") and not counts
    [(text, spoken)], counts = taught(agents.GLM45, [USER, ANSWER], ["<|endoftext|>"])
    assert spoken[0].endswith("sunny.") and counts == {notes.UNENDED: 1}


def test_an_answer_before_the_first_question_is_left_out_and_counted(taught: Taught) -> None:
    opening = {"from": "gpt", "value": "Where were we?"}
    turns = [opening, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    [(text, spoken)], counts = taught(templates.QWEN25, {"conversations": turns})
    assert spoken == ["Hello.<|im_end|>"] and "Where were we" not in text
    assert counts == {notes.OPENINGS: 1}
    with pytest.raises(ValueError, match="none after a user's"):
        taught(templates.QWEN25, {"conversations": turns[:1]})


def test_developers_and_two_user_turns_are_as_servers_take_them(taught: Taught) -> None:
    developer = {"role": "developer", "content": "Be brief."}
    assert (
        "<|start|>developer<|message|># Instructions\n\nBe brief."
        in taught(agents.GPT_OSS, [developer, USER, ANSWER])[0][0][0]
    )
    assert (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief."
        in taught(templates.LLAMA3, [developer, USER, USER, ANSWER])[0][0][0]
    )
    system = {"role": "system", "content": "Be kind."}
    with pytest.raises(ValueError, match="message 2: the chat template leaves out the developer's"):
        taught(agents.GPT_OSS, [system, developer, USER, ANSWER])


@pytest.mark.parametrize(
    "tools",
    [json.dumps(TOOLS), [json.dumps(TOOLS[0])], TOOLS[0], json.dumps(TOOLS[0])],
    ids=["text", "list of texts", "object", "text of an object"],
)
def test_tools_in_every_form_are_the_same_tools(tools: Any, taught: Taught) -> None:
    plain = taught(agents.KIMI_K2, {"messages": AGENT, "tools": TOOLS})
    assert taught(agents.KIMI_K2, {"messages": AGENT, "tools": tools}) == plain
    system = {"role": "system", "content": "Be brief."}
    inside = taught(agents.KIMI_K2, [{**system, "functions": [TOOLS[0]["function"]]}, *AGENT])
    assert inside == taught(agents.KIMI_K2, {"messages": [system, *AGENT], "tools": TOOLS})


def test_tools_that_are_none_or_left_out_are_told(taught: Taught) -> None:
    for tools, reason in (("none", "'tools': not JSON"), ([3], "not a list of tools")):
        with pytest.raises(ValueError, match=reason):
            taught(agents.KIMI_K2, {"messages": AGENT, "tools": tools})
    plain = {"messages": [USER, ANSWER], "tools": TOOLS}
    assert taught(templates.SMOLLM2, plain)[1] == {notes.TOOLS_LEFT_OUT: 1}


WITHOUT = """{{%- for m in messages %}}{{%- if {condition} %}}
{{{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}}}{{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n' }}}}{{%- endif %}}"""


@pytest.mark.parametrize(
    ("condition", "messages", "reason"),
    [
        ("m.role != 'system'", [{"role": "system", "content": "Be brief."}, USER, ANSWER],
         "message 1: the chat template leaves out the system's text"),
        ("m.role != 'tool'", [USER, {**ANSWER, "weight": 0}, RESULT, ANSWER],
         "message 3: the chat template leaves out the tool's text"),
        ("true", AGENT, "message 2: the chat template leaves out the assistant's call of"),
        ("loop.index0 != 2", [USER, ANSWER, USER, ANSWER],
         "message 3: .* leaves out the user's text, which occurs 2 times"),
        ("loop.index0 != 0", [{"role": "user", "content": "is"}, ANSWER],
         "message 1: the chat template leaves out the user's text"),
        ("true", [USER, {**ANSWER, "content": " "}], "message 2: the assistant says nothing"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_refused_by_name(
    condition: str, messages: list, reason: str, taught: Taught
) -> None:
    with pytest.raises(ValueError, match=reason):
        taught(WITHOUT.format(condition=condition), messages)


def test_variables_of_the_record_reach_the_template(taught: Taught) -> None:
    record = {"messages": [USER, ANSWER]}
    plain = taught(templates.QWEN3, record, enable_thinking=False)
    for extra in ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}},
                  {"chat_template_kwargs": '{"enable_thinking": false}'}):  # fmt: skip
        assert taught(templates.QWEN3, {**record, **extra}) == plain
    with pytest.raises(ValueError, match="'enable_thinking' must be of type bool, not 'no'"):
        taught(templates.QWEN3, {**record, "enable_thinking": "no"})
    with pytest.raises(ValueError, match="'chat_template_kwargs' is not an object"):
        taught(templates.QWEN3, {**record, "chat_template_kwargs": {"messages": []}})


def test_fields_that_nobody_reads_are_counted_by_name(taught: Taught) -> None:
    record = {
        "id": 1,
        "source": "x",
        "messages": [{**USER, "mood": "glad"}, {**ANSWER, "name": ""}],
    }
    assert taught(templates.QWEN3, record)[1] == {
        notes.UNREAD + "source": 1, notes.UNREAD + "mood": 1
    }  # fmt: skip
    with pytest.raises(ValueError, match="'image' beside the conversation: only text"):
        taught(templates.QWEN3, {**record, "image": "x.png"})


def test_a_word_of_the_template_s_text_is_no_field(taught: Taught) -> None:
    """Qwen's template writes ``<think>``, and reads neither ``tool_call`` nor a call's ``why``."""
    call = {**CALL, "why": "to look outside"}
    chat = [USER, {**CALLED, "tool_calls": [call]}, RESULT, {**ANSWER, "tool_call": "none"}]
    counts = taught(templates.QWEN3, chat)[1]
    told = {name: n for name, n in counts.items() if name != notes.UNSTABLE_TURNS}
    assert told == {notes.UNREAD + name: 1 for name in ("tool_call", "tool_call_id", "why")}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            [{"type": "thought", "text": "Hm."}, {"type": "text", "text": "Yes."}],
            "one is 'thought'",
        ),
        ([{"type": "image_url", "text": "a cat"}], "one is 'image_url'"),
        ([{"type": "text", "text": "a", "image_url": {"url": "x"}}], "'image_url' in a part"),
        ([{"image": "x.png"}], "'image' in a part"),
        ([{}], "one is None"),
        ({"text": "Yes."}, "neither text nor a list"),
    ],
)
def test_parts_that_are_no_text_are_refused(content: Any, reason: str, taught: Taught) -> None:
    with pytest.raises(ValueError, match=reason):
        taught(templates.QWEN25, [{**USER, "content": content}, ANSWER])


def test_text_parts_that_hold_nothing_and_media_in_messages(taught: Taught) -> None:
    parts = [
        {"type": "text", "text": USER["content"], "image": None},
        {"type": "text", "text": None},
    ]
    plain = taught(templates.QWEN25, [USER, ANSWER])
    assert taught(templates.QWEN25, [{**USER, "content": parts}, ANSWER]) == plain
    assert taught(templates.QWEN25, {"messages": json.dumps([USER, ANSWER])}) == plain
    with pytest.raises(ValueError, match="message 1: 'images' in the message: only text"):
        taught(templates.QWEN25, [{**USER, "images": ["x.png"]}, ANSWER])
    with pytest.raises(ValueError, match=r"^the system prompt: the content is neither text"):
        taught(templates.QWEN25, {"messages": [USER, ANSWER], "system": 5})


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ messages[0].content + 1 }}",
        "{% if %}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_fails_or_never_ends_is_one_line(
    template: str, taught: Taught, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    with pytest.raises(ValueError, match="the chat template fails: ") as caught:
        taught(template, [USER, ANSWER])
    assert "\n" not in str(caught.value)


def test_prompts_are_read_like_conversations() -> None:
    said = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    assert [m.content for m in parse_prompt({"conversations": said}).messages] == ["Hi"]
    assert parse_prompt({"messages": [USER], "tools": TOOLS, "system": "Be brief."}).tools == TOOLS
    bare = parse_prompt({"prompt": "Hi", "messages": None})
    assert bare == parse_prompt({"prompt": [{"role": "user", "content": [{"text": "Hi"}]}]})
    with pytest.raises(ValueError, match="message 1: the 'user' message has no content"):
        parse_prompt({"messages": [{"role": "user"}]})
