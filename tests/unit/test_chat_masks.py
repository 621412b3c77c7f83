"""Masks of real chat templates: what is supervised is what the assistant said, turn by turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_eagle.data.chat.conversations import parse_conversation
from megatron_eagle.data.chat.masked_tokens import Document, mask_tokens
from megatron_eagle.data.chat.template import ChatTemplate, RenderedSample
from megatron_eagle.data.chat.tokenizer import HuggingFaceTokenizer, load_tokenizer
from tests.helpers import chat_templates as templates

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
CHAT = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hello, how are you today?"},
    {"role": "user", "content": "What is the answer?"},
    {"role": "assistant", "content": "The answer is forty two."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
TOOL_CHAT = [
    {"role": "user", "content": "What is the weather in Paris?"},
    {"role": "assistant", "content": None,
     "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny in Paris."},
]  # fmt: skip
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(templates.make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


Masked = Callable[..., list[tuple[str, list[str]]]]


@pytest.fixture
def masked(tokenizer: HuggingFaceTokenizer) -> Masked:
    """(text, supervised runs of tokens decoded) of every sample of a conversation."""

    def run(template: str, messages: list, tools: Any = None, **options: Any) -> list:
        chat = ChatTemplate(template, tokenizer.names, options)
        conversation = parse_conversation({"messages": messages, "tools": tools})
        found = []
        for sample in chat.samples(conversation):
            document = mask_tokens(sample, tokenizer)
            assert tokenizer.decode(document.ids.tolist()) == sample.text
            found.append((sample.text, runs(document, tokenizer)))
        return found

    return run


def runs(document: Document, tokenizer: HuggingFaceTokenizer) -> list[str]:
    texts, run = [], []
    for token, supervised in zip(document.ids.tolist(), [*document.mask, False], strict=False):
        if supervised:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts + ([tokenizer.decode(run)] if run else [])


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["", "system"])
@pytest.mark.parametrize(
    ("template", "end"),
    [
        (templates.LLAMA3, "<|eot_id|>"),
        (templates.QWEN25, "<|im_end|>"),
        (templates.SMOLLM2, "<|im_end|>"),
        (templates.MARKED, "<|im_end|>"),
    ],
    ids=["llama3", "qwen2.5", "smollm2", "generation-blocks"],
)
def test_stable_templates_keep_the_conversation_in_one_sample(
    template: str, end: str, system: list, masked: Masked
) -> None:
    [(text, spoken)] = masked(template, [*system, *CHAT])
    assert spoken == [CHAT[1]["content"] + end, CHAT[3]["content"] + end]
    assert all(message["content"] in text for message in [*system, *CHAT])


def test_mistral_without_a_system_prompt_stays_in_one_sample(masked: Masked) -> None:
    [(_, spoken)] = masked(templates.MISTRAL, CHAT)
    assert spoken == [" Hello, how are you today?</s>", " The answer is forty two.</s>"]


def test_mistral_moves_the_system_prompt_so_every_turn_is_a_sample(masked: Masked) -> None:
    """Its template shows the system prompt in the last user message, and not at all once that is
    answered: neither rendering of the whole conversation is what the model saw."""
    first, second = masked(templates.MISTRAL, [SYSTEM, *CHAT])
    prompt = "[INST] You are a helpful assistant.\n\n"
    assert first == (f"<s>{prompt}Hello there[/INST] Hello, how are you today?</s>",
                     [" Hello, how are you today?</s>"])  # fmt: skip
    assert second[0] == (
        "<s>[INST] Hello there[/INST] Hello, how are you today?</s>"
        f"{prompt}What is the answer?[/INST] The answer is forty two.</s>"
    )
    assert second[1] == [" The answer is forty two.</s>"]


def test_qwen3_takes_thinking_out_of_earlier_turns(masked: Masked) -> None:
    thinking = [dict(message) for message in CHAT]
    thinking[1]["content"] = "<think>\nA greeting.\n</think>\n\nHello, how are you today?"
    thinking[3]["reasoning_content"] = "Easy."
    first, second = masked(templates.QWEN3, thinking)
    assert first[1] == ["<think>\nA greeting.\n</think>\n\nHello, how are you today?<|im_end|>"]
    assert "A greeting" not in second[0]
    assert second[1] == ["<think>\nEasy.\n</think>\n\nThe answer is forty two.<|im_end|>"]


def test_qwen3_with_thinking_off_supervises_the_answer_alone(masked: Masked) -> None:
    first, second = masked(templates.QWEN3, CHAT, enable_thinking=False)
    assert first[0].endswith("<think>\n\n</think>\n\nHello, how are you today?<|im_end|>\n")
    assert first[1] == ["Hello, how are you today?<|im_end|>"]
    assert second[1] == ["The answer is forty two.<|im_end|>"]


def test_tool_calls_are_the_models_and_results_are_not(masked: Masked) -> None:
    [(text, spoken)] = masked(templates.QWEN25, TOOL_CHAT, TOOLS)
    assert spoken == [f"{CALL}<|im_end|>", "It is sunny in Paris.<|im_end|>"]
    assert "<tool_response>\nsunny\n</tool_response>" in text and '"name": "weather"' in text
    [(_, spoken)] = masked(templates.MISTRAL, TOOL_CHAT, TOOLS)
    assert spoken[0].startswith("[TOOL_CALLS]") and spoken[0].endswith("]</s>")
    assert spoken[1] == " It is sunny in Paris.</s>"


def test_qwen3_keeps_thinking_between_tool_calls_in_one_sample(masked: Masked) -> None:
    chat = [*CHAT[:2], *[dict(message) for message in TOOL_CHAT]]
    chat[3]["reasoning_content"] = "Ask."
    chat[5]["reasoning_content"] = "Tell."
    first, second = masked(templates.QWEN3, chat, TOOLS)
    assert len(first[1]) == 1
    assert second[1] == [
        f"<think>\nAsk.\n</think>\n\n{CALL}<|im_end|>",
        "<think>\nTell.\n</think>\n\nIt is sunny in Paris.<|im_end|>",
    ]


def test_a_prompt_that_opens_thinking_which_the_history_lacks_stays_one_sample(
    masked: Masked,
) -> None:
    [(text, spoken)] = masked(templates.DEEPSEEK_R1, CHAT)
    assert spoken == ["Hello, how are you today?</s>", "The answer is forty two.</s>"]
    assert "<think>" not in text


def test_repeated_and_nested_texts_are_told_apart(masked: Masked) -> None:
    """What a search for the answer's text would get wrong."""
    chat = [
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": "user"},
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": "user"},
    ]
    [(_, spoken)] = masked(templates.QWEN25, chat)
    assert spoken == ["user<|im_end|>", "user<|im_end|>"]


def test_a_merge_across_the_boundary_is_cut_as_a_server_cuts_it(
    masked: Masked, tokenizer: HuggingFaceTokenizer
) -> None:
    chat = [CHAT[0], {"role": "assistant", "content": "\n\nuser asks"}]
    header = tokenizer.encode("assistant\n")[0]
    joined = tokenizer.encode("assistant\n\n\nuser asks")[0]
    assert joined[: len(header)] != header, "the tokenizer must merge the newlines"
    [(_, spoken)] = masked(templates.SMOLLM2, chat)
    assert spoken == ["\n\nuser asks<|im_end|>"]


def test_an_answer_may_hold_an_end_token_and_characters_of_several_tokens(
    masked: Masked,
) -> None:
    answer = "sunny <|im_end|> \N{SNOWMAN}\N{GRINNING FACE} in Paris\n"
    [(_, spoken)] = masked(templates.SMOLLM2, [CHAT[0], {"role": "assistant", "content": answer}])
    assert spoken == [answer + "<|im_end|>"]


def test_a_template_without_special_tokens_keeps_its_own_end(masked: Masked) -> None:
    chat = [dict(m, content=" " + m["content"]) if m["role"] == "assistant" else m for m in CHAT]
    [(_, spoken)] = masked(templates.PLAIN, chat)
    assert spoken == [" Hello, how are you today?\n", " The answer is forty two.\n"]


def test_the_templates_refusal_reaches_the_user(masked: Masked) -> None:
    refusing = "{{ raise_exception('no system prompts here') }}"
    with pytest.raises(ValueError, match="the chat template fails: no system prompts here"):
        masked(refusing, CHAT)


def test_a_template_that_lets_the_answer_change_its_prompt_is_refused(masked: Masked) -> None:
    template = (
        "{{ messages[-1].content if add_generation_prompt else messages[-1].content | length }}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"message 4: .*no prefix of the text is its prompt"):
        masked(template, CHAT)


def test_the_mask_can_be_wrong(tokenizer: HuggingFaceTokenizer) -> None:
    """The comparison of the tests above sees one token too many."""
    sample = RenderedSample("user Hello<|im_end|>\n", [(4, 21)], marked=True)
    assert runs(mask_tokens(sample, tokenizer), tokenizer) == [" Hello<|im_end|>\n"]


def test_sharegpt_and_openai_forms_are_the_same_conversation() -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in [SYSTEM, *CHAT]]
    sharegpt = parse_conversation({"conversations": turns})
    assert sharegpt == parse_conversation({"messages": [SYSTEM, *CHAT]})
    called = parse_conversation({"conversations": [
        {"from": "human", "value": "x"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "r"},
        {"from": "gpt", "value": "y"},
    ], "tools": '[{"name": "f"}]'})  # fmt: skip
    [call] = called.messages[1].calls
    assert (call.name, call.arguments) == ("f", {"a": 1})
    assert called.messages[2].role == "tool" and called.tools == [{"name": "f"}]


def test_text_parts_are_joined_and_unanswered_messages_dropped() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    chat = [{"role": "user", "content": parts}, CHAT[1], CHAT[2]]
    conversation = parse_conversation({"messages": chat})
    assert [m.content for m in conversation.messages] == ["Hello", CHAT[1]["content"]]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "the conversation is empty"),
        ([CHAT[1]], "no assistant message in the conversation, or none after a user's"),
        ([CHAT[0], CHAT[2]], "no assistant message"),
        ([*CHAT, CHAT[1]], "message 5: roles out of order: 'assistant' after 'assistant'"),
        ([CHAT[0], {"role": "tool", "content": "x"}], "message 2: roles out of order: 'tool'"),
        ([{**CHAT[0], "from": "gpt"}], "message 1: two roles, 'user' and 'gpt'"),
        ([{"role": "user", "content": None}], "message 1: the 'user' message has no content"),
        ([{"role": "narrator", "content": "x"}], "message 1: unknown role 'narrator'"),
        ([CHAT[0]], "no assistant message"),
        ([CHAT[0], {"role": "assistant", "content": " "}], "message 2: the assistant says nothing"),
        ([{"role": "user", "content": 3}], "message 1: the content is neither text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 1: the content"),
        (["hello"], "message 1: not a JSON object"),
    ],
)
def test_bad_conversations_are_named(messages: list, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_conversation({"messages": messages})


def test_sentencepiece_control_pieces_and_offsets_give_the_mask(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(templates.make_sentencepiece(tmp_path))
    chat = ChatTemplate(templates.MISTRAL, tokenizer.names, {})
    [sample] = chat.samples(parse_conversation({"messages": CHAT}))
    document = mask_tokens(sample, tokenizer)
    assert document.ids[0] == 1 and document.ids[-1] == tokenizer.eos_id and document.mask[-1]
    ids = document.ids[document.mask].tolist()
    assert tokenizer.decode(ids) == "Hello, how are you today?</s>The answer is forty two.</s>"
