"""eagle_base.json: only what describes an architecture, each field of its type and range."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_eagle.checkpoint.base_fields import (
    OPTIONAL,
    REQUIRED,
    ROPE,
    check_complete,
    check_megatron_args,
    check_rope,
    check_token_ids,
)
from megatron_eagle.checkpoint.directory import load_base_json, parse_base
from megatron_eagle.errors import UserError

METADATA = Path(__file__).resolve().parents[1] / "data" / "draft_v1"
BASES = [json.loads(file.read_text())["base"] for file in sorted(METADATA.glob("metadata_*.json"))]
NONSENSE: tuple[Any, ...] = (
    None, "x", -1, 10**30, [], {}, [1, 2, 3], float("nan"), float("inf"), "--save", [None], 1.5e300
)  # fmt: skip


def test_descriptions_of_real_bases_are_accepted() -> None:
    assert len(BASES) > 3
    for base in BASES:
        parse_base(base, "x")
        check_complete(base["megatron_args"], "x")


@pytest.mark.parametrize("name", [*REQUIRED, *OPTIONAL])
def test_nonsense_is_refused_by_name(name: str) -> None:
    for value in NONSENSE:
        with pytest.raises(UserError, match=f"^x: {name} must be ") as caught:
            check_megatron_args({name: value}, "x")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ROPE)
def test_nonsense_in_a_rope_is_refused(name: str) -> None:
    for value in NONSENSE:
        rope = {"rope_type": "linear", "rope_theta": 1e4, name: value}
        with pytest.raises(UserError, match=f"^x: rope: {name} must be "):
            check_rope(rope, "x")


@pytest.mark.parametrize(
    "flag", ["save", "load", "exit_interval", "data_path", "spec", "tokenizer_model", "__class__"]
)
def test_other_flags_of_megatron_s_are_refused(flag: str) -> None:
    base = {**BASES[0], "megatron_args": {**BASES[0]["megatron_args"], flag: 1}}
    with pytest.raises(UserError, match=f"^x: megatron_args: unknown field '{flag}'"):
        parse_base(base, "x")
    with pytest.raises(UserError, match=f"^x: unknown field '{flag}'"):
        parse_base({**BASES[0], flag: 1}, "x")
    with pytest.raises(UserError, match=f"^x: rope: unknown field '{flag}'"):
        check_rope({"rope_type": "default", "rope_theta": 1.0, flag: 1}, "x")


def test_a_missing_argument_is_named() -> None:
    args = {**BASES[0]["megatron_args"]}
    del args["rotary_percent"]
    with pytest.raises(UserError, match=r"^x: megatron_args: rotary_percent is missing"):
        check_complete(args, "x")


@pytest.mark.parametrize("value", ["x", [None], {}, 1.5, True, -1, 10**9, [0, "1"]])
def test_token_ids_that_are_none_are_refused(value: Any) -> None:
    for key in ("eos_token_id", "bos_token_id"):
        with pytest.raises(UserError, match=f"^x: {key}: "):
            check_token_ids({key: value}, 100, "x")


def test_token_ids_that_are_some_are_accepted() -> None:
    check_token_ids({"eos_token_id": [0, 99], "bos_token_id": None, "pad_token_id": 100}, 100, "x")
    check_token_ids({}, 100, "x")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe{}", b"null", b'{"version": 1}'])
def test_a_damaged_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "eagle_base.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_base_json(tmp_path)
    shown = caught.value.named(lambda name: f"--{name}")
    assert shown.startswith(f"{tmp_path / 'eagle_base.json'}: ")
    assert "\n" not in shown
