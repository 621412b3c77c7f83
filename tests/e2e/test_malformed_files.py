"""Fuzzing: 1,960 malformed files and 770 flag values: a result or one line, no traceback, no hang.

Seeded, so a failure can be repeated: its message holds the number of the variant.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from megatron_eagle.checkpoint.directory import BASE_JSON_NAME
from megatron_eagle.cli import (
    convert,
    describe_base,
    import_base,
    import_draft,
    prepare_data,
    regenerate,
    verify,
)
from megatron_eagle.data.documents import open_documents
from megatron_eagle.decode.prompts import read_prompt_ids
from megatron_eagle.errors import UserError
from megatron_eagle.hf.base.import_base import import_base as import_tiny
from tests.helpers.exported_draft import exported
from tests.helpers.hf_directories import byte_tokenizer
from tests.helpers.malformed import malformed_bytes, malformed_json
from tests.helpers.random_answers import write_answers
from tests.helpers.tiny_hf import make_base
from tests.helpers.trained_draft import TrainedDraft

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
SECONDS = 60
CHATS = (
    '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}\n'
)


class Hang(BaseException):
    """Raised where a command takes longer than ``SECONDS``."""


@contextmanager
def no_hang() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a base, a draft of it, a tokenizer, chats and a data set."""
    folder = tmp_path_factory.mktemp("malformed")
    make_base(folder / "hf", "llama", num_hidden_layers=1)
    import_tiny(folder / "hf", folder / "base")
    TrainedDraft.make().save(folder / "draft")
    byte_tokenizer(folder / "tokenizer")
    write_answers(folder / "answers.jsonl", 4)
    (folder / "chats.jsonl").write_text(CHATS * 3)
    assert prepare_data.main(prepare_words(folder, folder / "set")) == 0
    return folder


def prepare_words(folder: Path, prefix: Path) -> list[str]:
    return [
        *("--input", str(folder / "chats.jsonl"), "--tokenizer", str(folder / "tokenizer")),
        *("--output-prefix", str(prefix), "--overwrite"),
    ]


def fuzz(
    file: Path, count: int, command: Callable[[], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Run ``command`` with ``count`` malformed variants of ``file``, then put it back."""
    whole = file.read_bytes()
    is_json = file.suffix in (".json", ".jsonl")
    try:
        for number in range(count):
            rng = random.Random(f"{file.name} {number}")
            text = whole.decode() if is_json else ""
            content = malformed_json(text, rng) if is_json else malformed_bytes(whole, rng)
            file.write_bytes(content)
            check(command, f"{file.name}, variant {number}: {content[:300]!r}", capsys)
    finally:
        file.write_bytes(whole)


def check(command: Callable[[], int], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    try:
        with no_hang():
            status = command()
    except SystemExit as error:  # of argparse, which says how the command is called, too
        status = error.code
    except (Hang, Exception) as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    printed = capsys.readouterr().err.splitlines()
    lines = [line for line in printed if re.match(r"(prog: )?error: ", line)]
    assert (status, len(lines)) in ((0, 0), (2, 1)), f"{what}: status {status}, {lines}"


def fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


@pytest.mark.parametrize(
    ("name", "count"),
    [("config.json", 350), ("model.safetensors", 200), ("generation_config.json", 60)],
)
def test_models(name: str, count: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, save = folder / "hf", folder / "imported"

    def command() -> int:
        return import_base.main(["--hf", str(hf), "--save", str(fresh(save))])

    fuzz(hf / name, count, command, capsys)


@pytest.mark.parametrize(
    ("place", "pattern", "count"),
    [
        ("base", "eagle_base.json", 250),
        ("base", "latest*.txt", 20),
        ("base", "release/metadata.json", 20),
        ("base", "release/.metadata", 60),
        ("base", "release/*.distcp", 60),
        ("draft", "*/.metadata", 40),
        ("draft", "*/*.distcp", 40),
        (".", "set.idx", 60),
        (".", "set.bin", 20),
        (".", "set_loss_mask.idx", 20),
        (".", "set.json", 20),
    ],
)
def test_what_verify_reads(
    place: str, pattern: str, count: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = (folder / place).glob(pattern)
    path = folder / "set" if place == "." else folder / place
    fuzz(file, count, lambda: verify.main([str(path)]), capsys)


def test_drafts_to_convert(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--load", str(folder / "draft"), "--overwrite", "--output", str(folder / "exported")]
    for pattern, count in (("*/.metadata", 20), ("*/*.distcp", 40)):
        (file,) = (folder / "draft").glob(pattern)
        fuzz(file, count, lambda: convert.main(words), capsys)


@pytest.mark.parametrize(("name", "count"), [("config.json", 100), ("model.safetensors", 40)])
def test_drafts_of_others(
    name: str, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft, directory = exported(tmp_path, "hf")
    base = tmp_path / "base"
    base.mkdir()
    (base / BASE_JSON_NAME).write_text(json.dumps(draft.metadata["base"]))

    def command() -> int:
        save = fresh(tmp_path / "saved")
        return import_draft.main(["--hf", str(directory), "--base", str(base), "--save", str(save)])

    fuzz(directory / name, count, command, capsys)


@pytest.mark.parametrize(("name", "count"), [("tokenizer.json", 50), ("tokenizer_config.json", 50)])
def test_tokenizers(
    name: str, count: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = prepare_words(folder, folder / "other")
    fuzz(folder / "tokenizer" / name, count, lambda: prepare_data.main(words), capsys)


@pytest.mark.parametrize("options", [(), ("--skip-bad-lines",)])
def test_chats(options: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*prepare_words(folder, folder / "other"), *options]
    (folder / "chats.jsonl").write_text(CHATS)
    fuzz(folder / "chats.jsonl", 70, lambda: prepare_data.main(words), capsys)
    (folder / "chats.jsonl").write_text(CHATS * 3)


PROMPTS = (
    {"prompt": "hi"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "tools": None},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    {"prompt_ids": [1, 2, 3], "messages": []},
)


@pytest.mark.parametrize("record", PROMPTS, ids=["prompt", "messages", "conversations", "ids"])
def test_prompts(record: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "prompts.jsonl"
    file.write_text(json.dumps(record))

    def command() -> int:
        try:
            read_prompt_ids(file, str(folder / "tokenizer"), 258)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    fuzz(file, 50, command, capsys)


VALUES = (
    *("", " ", "-1", "0", "1", "2147483648", "9" * 5000, "nan", "inf", "1e400", "null", "x" * 5000),
    *("{}", "[" * 5000, '{"a": 1}', "\u2028<save>", "a\nb", "/dev/null", "/dev/null/x", ".", ".."),
)
FLAGS = {
    prepare_data: "--chat-template --template-options --thinking --vocab-size --show --workers",
    convert: "--format --dtype --data --base-name --base-note --hf-config --eval",
    import_base: "--base-name",
    import_draft: "--aux-layers",
    describe_base: "--base-description --write --vocab-size",
    regenerate: "--max-new-tokens --batch-size --temperature --seed --dtype",
}
"""Further flags of each command that take a value."""


@pytest.mark.parametrize("command", FLAGS, ids=lambda command: command.__name__.split(".")[-1])
def test_flags(
    command: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Every value that a flag can take is replaced by a strange one, or the flag is added."""
    monkeypatch.chdir(tmp_path)
    out, hf, base, draft = tmp_path / "out", folder / "hf", folder / "base", folder / "draft"
    words: list[object] = {
        prepare_data: prepare_words(folder, out),
        convert: ["--load", draft, "--output", out, "--overwrite"],
        import_base: ["--hf", hf, "--save", out],
        import_draft: ["--hf", draft, "--base", base, "--save", out],
        describe_base: [base],
        regenerate: ["--model", hf, "--prompts", folder / "answers.jsonl", "--output", out],
    }[command]
    given = [at for at, word in enumerate(words) if not str(word).startswith("--")]
    for value in VALUES:
        lines = [[*words[:at], value, *words[at + 1 :]] for at in given]
        lines += [[*words, flag, value] for flag in FLAGS[command].split()]
        for line in lines:
            fresh(out)
            line = list(map(str, line))
            check(lambda line=line: command.main(line, "prog"), " ".join(line)[:300], capsys)


def test_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "answers.jsonl"
    file.write_text(file.read_text().splitlines(keepends=True)[0])

    def command() -> int:
        try:
            open_documents(str(file), 61)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    fuzz(file, 100, command, capsys)
