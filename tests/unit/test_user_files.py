"""The boundary of a user's files: one line that names flag and file, whatever goes wrong."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.user_files import naming, parse_json, read_json_object, reading, reading_file

DEEP = b"[" * 100_000
LONG = b'{"a": ' + b"9" * 5000 + b"}"


@pytest.mark.parametrize(
    "error",
    [
        TypeError("x\ny"), KeyError("k"), RuntimeError("\n\n  broken  \nmore"), AssertionError(),
        RecursionError("deep"), MemoryError(), zipfile.BadZipFile("no zip"), OverflowError("big"),
        OSError(36, "File name too long"), EOFError("end"), IndexError(), ZeroDivisionError("0"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ValueError("value <dtype> in it"),
    ],
)  # fmt: skip
def test_any_exception_names_parameter_and_file(error: Exception) -> None:
    with pytest.raises(UserError) as caught, reading("train_data", "dir/<x>.jsonl"):
        raise error
    shown = caught.value.named(lambda name: f"--{name}")
    assert shown.startswith("--train_data dir/<x>.jsonl: cannot be read")
    assert "\n" not in shown
    assert "<dtype>" in shown or "dtype" not in shown  # another's words are no parameter


def test_a_panic_in_rust_is_one_line_and_ctrl_c_is_not() -> None:
    class PanicException(BaseException):
        """As tokenizers and safetensors raise it."""

    line = r"^f: cannot be read \(RuntimeError: index out of bounds\)$"
    with pytest.raises(UserError, match=line), reading_file("f"):
        raise PanicException("index out of bounds\nnote: run with RUST_BACKTRACE=1")
    with pytest.raises(KeyboardInterrupt), reading_file("f"):
        raise KeyboardInterrupt


def test_our_own_words_are_kept_and_get_the_parameter() -> None:
    with pytest.raises(UserError, match=r"^a.json: bad$"), reading("hf", "a"):
        raise UserError("a.json: bad")
    with pytest.raises(UserError, match=r"^hf a.json: bad$"), naming("hf"), reading("hf", "a"):
        raise UserError("a.json: bad")
    with pytest.raises(UserError, match=r"^save b: bad$"), naming("hf"):
        raise UserError("<save> b: bad")
    with pytest.raises(UserError, match=r"^f: cannot be read \(TypeError\)$"), reading_file("f"):
        raise TypeError


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (DEEP, "nested too deep"), (LONG, "not valid JSON"), (b"\xff\xfe{}", "not valid JSON"),
        (b"", "not valid JSON"), (b"[]", "expected a JSON object, found list"),
    ],
)  # fmt: skip
def test_json_of_any_kind_is_one_line(content: bytes, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        read_json_object(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_json_is_parsed() -> None:
    assert parse_json('{"a": [1, 2.5, null]}', "x") == {"a": [1, 2.5, None]}
