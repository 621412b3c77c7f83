"""tools/regenerate.py: a base's own answers, batched, resumable, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron_eagle.cli.regenerate import main
from megatron_eagle.data import regenerate
from megatron_eagle.data.answer_file import finished_answers
from megatron_eagle.data.chat.conversations import parse_prompt
from megatron_eagle.data.regenerate import Generation, read_prompts
from tests.helpers.tiny_hf import make_base

TEMPLATE = (
    "{% if 'refuse' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
    "{% if tools %}<s>{{ tools | tojson }}</s>{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
END = 1
PROMPTS = ["hi", "why is the sky blue?", "a", "two words", "what a longer prompt this one is"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base with a byte-level tokenizer of 258 ids and a chat template."""
    folder = tmp_path_factory.mktemp("base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    make_base(folder, "llama", vocab_size=258, max_position_embeddings=128, eos_token_id=END)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_lines(
        tmp_path / "prompts.jsonl",
        [{"id": f"p{i}", "prompt": text} for i, text in enumerate(PROMPTS)],
    )


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record for record in records}


def run(
    monkeypatch: pytest.MonkeyPatch, model: Path, prompts: Path, output: Path, *more: str
) -> int:
    words = ["--model", str(model), "--prompts", str(prompts), "--output", str(output), *more]
    monkeypatch.setattr(sys, "argv", ["regenerate.py", *words])
    return main()


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The plain definition: no batch, no padding, no cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


def test_batched_answers_are_the_greedy_ones(
    base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "answers.jsonl"
    assert (
        run(monkeypatch, base, prompts, output, "--max-new-tokens", "24", "--batch-size", "3") == 0
    )
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    records = read_lines(output)
    assert set(records) == {f"p{i}" for i in range(len(PROMPTS))}
    for i, text in enumerate(PROMPTS):
        record = records[f"p{i}"]
        templated = f"<s>user {text}</s><s>assistant "
        assert tokenizer.decode(record["prompt_ids"]) == templated
        assert record["answer_ids"] == greedy(model, record["prompt_ids"], 24)
        assert [m["role"] for m in record["messages"]] == ["user", "assistant"]
        said = tokenizer.decode(record["answer_ids"], skip_special_tokens=True)
        assert record["messages"][1]["content"] == said


def test_tools_and_text_parts_reach_the_template(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    chat = [
        {"from": "human", "value": [{"type": "text", "text": "hi"}], "role": None},
        {"from": "gpt", "value": "hello", "tool_calls": []},
    ]
    asked = write_lines(
        tmp_path / "p.jsonl", [{"conversations": chat, "tools": [json.dumps(tool)], "mood": 1}]
    )
    assert run(monkeypatch, base, asked, tmp_path / "a.jsonl", "--max-new-tokens", "2") == 0
    assert "chat template reads: mood (1)" in capsys.readouterr().out
    [record] = read_lines(tmp_path / "a.jsonl").values()
    text = AutoTokenizer.from_pretrained(base).decode(record["prompt_ids"])
    assert "weather" in text and text.endswith("<s>user hi</s><s>assistant ")
    assert record["tools"] == [tool] and len(record["messages"]) == 2


def test_greedy_is_greedy_whatever_generation_config_says(
    base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A repetition penalty would change every answer; a second end token has to end some."""
    assert run(monkeypatch, base, prompts, tmp_path / "plain.jsonl", "--max-new-tokens", "9") == 0
    plain = {name: r["answer_ids"] for name, r in read_lines(tmp_path / "plain.jsonl").items()}
    end = next(iter(plain.values()))[1]
    other = tmp_path / "base"
    shutil.copytree(base, other)
    (other / "generation_config.json").write_text(json.dumps({
        "eos_token_id": [END, end], "repetition_penalty": 5.0, "do_sample": True, "top_k": 2,
        "no_repeat_ngram_size": 1}))  # fmt: skip
    assert run(monkeypatch, other, prompts, tmp_path / "a.jsonl", "--max-new-tokens", "9") == 0
    assert "only end tokens are used, not do_sample True" in capsys.readouterr().out
    answers = {name: r["answer_ids"] for name, r in read_lines(tmp_path / "a.jsonl").items()}
    for name, answer in plain.items():
        cut = answer.index(end) + 1 if end in answer else len(answer)
        assert answers[name] == answer[:cut]
    assert any(answers[name] != plain[name] for name in plain)


class Scripted:
    """A model whose rows answer with fixed ids, so that the end token's handling is certain."""

    device = torch.device("cpu")

    class config:
        max_position_embeddings = 64

    class generation_config:
        eos_token_id = END

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = torch.tensor([[50, END, 0, 0], [51, 52, 53, 54]])[: len(input_ids)]
        return torch.cat([input_ids, rows], dim=1)


def test_answers_end_with_the_end_token_only_when_it_was_said(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    asked = {name: parse_prompt({"prompt": name}) for name in ("a", "b")}
    output = tmp_path / "answers.jsonl"
    written = regenerate.regenerate(
        Scripted(), tokenizer, asked, output, Generation(max_new_tokens=4), lambda _: None
    )
    records = read_lines(output)
    assert written == 6
    assert records["a"]["answer_ids"] == [50, END]
    assert records["b"]["answer_ids"] == [51, 52, 53, 54]


def test_a_killed_run_goes_on(
    base: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, flags = tmp_path / "answers.jsonl", ("--max-new-tokens", "6", "--batch-size", "2")
    assert run(monkeypatch, base, prompts, output, *flags) == 0
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    capsys.readouterr()
    assert run(monkeypatch, base, prompts, output, *flags) == 0
    assert "torn last line" in capsys.readouterr().out
    assert output.read_bytes() == whole
    assert run(monkeypatch, base, prompts, output, *flags) == 0
    assert output.read_bytes() == whole, "a finished file stays as it is"
    tools = [{"type": "function", "function": {"name": "look"}}]
    records = [json.loads(line) for line in prompts.read_text().splitlines()]
    with_tools = tmp_path / "with_tools.jsonl"
    with_tools.write_text(
        "".join(json.dumps({**record, "tools": tools}) + "\n" for record in records)
    )
    assert run(monkeypatch, base, with_tools, output, *flags) == 2
    assert "answers another prompt" in capsys.readouterr().err
    assert output.read_bytes() == whole


def test_a_line_torn_inside_a_character_is_dropped(tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_bytes(b'{"id":"p0"}\n{"id":"p1","x":"\xc3')
    assert finished_answers(output, lambda _: None) == {"p0": {"id": "p0"}}
    assert output.read_bytes() == b'{"id":"p0"}\n'


def test_sampling_depends_on_the_seed(
    base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(name: str, seed: str) -> list[list[int]]:
        flags = ("--max-new-tokens", "16", "--temperature", "1.5", "--seed", seed)
        assert run(monkeypatch, base, prompts, tmp_path / name, *flags) == 0
        return [record["answer_ids"] for record in read_lines(tmp_path / name).values()]

    first = answers("a.jsonl", "1")
    assert answers("b.jsonl", "1") == first
    assert answers("c.jsonl", "2") != first


def test_conversations_lose_their_last_answer(tmp_path: Path) -> None:
    turns = [{"role": r, "content": c} for r, c in (("user", "x"), ("assistant", "y"))]
    file = write_lines(tmp_path / "p.jsonl", [{"messages": turns}, {"id": 7, "prompt": "z"}])
    read = read_prompts(file)
    assert {name: [m.content for m in prompt.messages] for name, prompt in read.items()} == {
        "1": ["x"], "7": ["z"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        ("\n", "no prompts"),
        ('{"prompt": "x\u2028y"}\n{"prompt": \n', ":2: not JSON"),
        ('{"prompt": " "}\n', ":1: 'prompt' is neither a text nor"),
        ('{"messages": [{"role": "user"}]}\n', ":1: message 1: the 'user' message has no content"),
        (
            '{"messages": [{"role": "user", "content": 5}]}\n',
            ":1: message 1: the content is neither",
        ),
        ('{"prompt": "rain \\ud83d"}\n', ":1: not text: surrogates not allowed"),
        ('{"conversations": [{"from": "human", "value": "x"}]}\n', ":1: no answer in 'conv"),
        ('{"question": "x"}\n', ":1: has neither a 'prompt' text nor a list of 'messages'"),
        ('{"prompt": "x", "id": null}\n{"prompt": "refuse me"}\n', "prompt '2': the chat template"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', ":1: nothing to answer"),
        ('["x"]\n', ":1: not a JSON object"),
        ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n', "occurs twice"),
        (f'{{"id": "a", "prompt": "{"x" * 200}"}}\n', "exceed the model's 128 positions"),
    ],
)
def test_bad_prompts_are_one_line(
    content: str | None,
    expected: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_text(content)
    assert run(monkeypatch, base, file, tmp_path / "answers.jsonl") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and expected in error


def test_other_mistakes_are_one_line(
    base: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "p0"}\nnot an answer\n{"id": "p1"}\n')
    output = tmp_path / "answers.jsonl"
    mute = AutoTokenizer.from_pretrained(base)
    mute.chat_template = None
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: mute)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((tmp_path, prompts, output), "not a Hugging Face model directory"),
        ((base, prompts, output, "--batch-size", "0"), "--batch-size must be at least 1"),
        ((base, prompts, output, "--temperature", "-1"), "--temperature -1.0"),
        ((base, prompts, output, "--temperature", "nan"), "--temperature nan must be a number"),
        ((base, prompts, output, "--temperature", "1e-300"), "--temperature 1e-300 is too low"),
        ((base, prompts, output), "no chat template"),
    ]
    for words, expected in cases:
        assert run(monkeypatch, *words) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and expected in error
    with pytest.raises(ValueError, match=r"broken.jsonl:2"):
        finished_answers(broken, lambda _: None)
