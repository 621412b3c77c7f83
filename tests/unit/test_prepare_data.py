"""tools/prepare_data.py: what lands in the .bin/.idx, resuming, several processes, bad input."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_eagle.cli.prepare_data import main
from megatron_eagle.data.chat import parts as module
from megatron_eagle.data.chat.prepare import prepare
from megatron_eagle.data.chat.records import RecordOptions
from megatron_eagle.data.chat.tokenizer import load_tokenizer
from megatron_eagle.data.indexed import IndexedDocuments
from megatron_eagle.data.jsonl import FilePiece
from tests.helpers import chat_templates as templates

ROOT = Path(__file__).resolve().parents[2]
QUESTION = {"role": "user", "content": "What is the weather in Paris?"}


def chat(answer: str) -> dict[str, Any]:
    return {"messages": [QUESTION, {"role": "assistant", "content": answer}]}


def write(path: Path, records: list[Any]) -> str:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    return str(templates.make_tokenizer(folder, templates.SMOLLM2))


def test_all_forms_become_documents_with_masks(tokenizer: str, tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", [
        chat("It is sunny."),
        "",
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "fine"}]},
        {"text": "Hello there"},
        {"prompt_ids": [5, 6, 7], "answer_ids": [8, 9], **chat("As regenerate writes it.")},
    ])  # fmt: skip
    prefix = str(tmp_path / "out")
    code = main(["--input", file, "--tokenizer", tokenizer, "--output-prefix", prefix])
    assert code == 0
    data, inner = IndexedDocuments(prefix, 600), load_tokenizer(tokenizer)
    spoken = [inner.decode(ids[mask].tolist()) for ids, mask in (data[i] for i in range(4))]
    assert spoken[:3] == ["It is sunny.<|im_end|>", "fine<|im_end|>", "Hello there</s>"]
    assert data[3][0].tolist() == [5, 6, 7, 8, 9]
    assert data[3][1].tolist() == [False, False, False, True, True]
    summary = json.loads((tmp_path / "out.json").read_text())
    assert summary["documents"] == len(data) == 4
    assert summary["tokens"] == int(data.lengths.sum())
    assert summary["supervised_tokens"] == sum(int(data[i][1].sum()) for i in range(4))
    assert sorted(p.name for p in tmp_path.glob("out*")) == [
        "out.bin", "out.idx", "out.json", "out_loss_mask.bin", "out_loss_mask.idx"
    ]  # fmt: skip
    ids = np.fromfile(tmp_path / "out.bin", dtype=np.uint16)
    assert len(ids) == summary["tokens"], "a small vocabulary takes two bytes a token"


def test_template_options_reach_the_template_and_unstable_turns_are_split(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    thinking = chat("<think>\nHm.\n</think>\n\nSunny.")
    thinking["messages"] += chat("Cold.")["messages"]
    file = write(tmp_path / "in.jsonl", [thinking])
    (tmp_path / "qwen3.jinja").write_text(templates.QWEN3)
    prefix = str(tmp_path / "out")
    words = ["--input", file, "--tokenizer", tokenizer, "--output-prefix", prefix]
    words += ["--chat-template", str(tmp_path / "qwen3.jinja")]
    assert main([*words, "--thinking", "off"]) == 2
    assert "message 2: with this answer the chat template renders" in capsys.readouterr().err
    assert main(words) == 0
    assert "not prefix-stable: 1 earlier turns" in capsys.readouterr().out
    data, inner = IndexedDocuments(prefix, 600), load_tokenizer(tokenizer)
    spoken = [inner.decode(ids[mask].tolist()) for ids, mask in (data[i] for i in range(2))]
    assert spoken == [
        "<think>\nHm.\n</think>\n\nSunny.<|im_end|>",
        "<think>\n\n</think>\n\nCold.<|im_end|>",
    ]


def test_a_sentencepiece_model_takes_a_template_of_the_user_s(tmp_path: Path) -> None:
    model = str(templates.make_sentencepiece(tmp_path))
    file = write(tmp_path / "in.jsonl", [chat("It is sunny."), {"text": "Hello there"}])
    (tmp_path / "mistral.jinja").write_text(templates.MISTRAL)
    words = ["--input", file, "--tokenizer", model, "--output-prefix", str(tmp_path / "out")]
    assert main([*words, "--chat-template", str(tmp_path / "mistral.jinja")]) == 0
    tokenizer = load_tokenizer(model)
    data = IndexedDocuments(str(tmp_path / "out"), tokenizer.vocab_size)
    spoken = [tokenizer.decode(ids[mask].tolist()) for ids, mask in (data[0], data[1])]
    assert spoken == ["It is sunny.</s>", "Hello there</s>"]


BAD = [
    chat("It is sunny."),
    '{"messages": [{"role": "us',
    {"messages": []},
    {"messages": [QUESTION, QUESTION]},
    {"messages": [QUESTION]},
    {"prompt_ids": [1], "answer_ids": [999]},
    {"prompt_ids": [-(2**70)], "answer_ids": [9]},
    {"question": "?"},
    "[]",
    chat("It is windy."),
]
REASONS = [
    ":2: not JSON (", ":3: the conversation is empty", ":4: no assistant message",
    ":5: no assistant message", ":6: answer_ids: token id 999 is outside the vocabulary's 0 to ",
    f":7: prompt_ids: token id -{2**70} is outside the vocabulary's 0",
    ":8: the record has none of messages", ":9: not a JSON object",
]  # fmt: skip


def test_a_bad_line_stops_and_is_named(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = write(tmp_path / "bad.jsonl", BAD)
    words = ["--input", file, "--tokenizer", tokenizer, "--output-prefix", str(tmp_path / "out")]
    assert main(words) == 2
    assert f"error: {file}:2: not JSON (" in capsys.readouterr().err
    assert not (tmp_path / "out.idx").exists()


def test_bad_lines_are_counted_and_listed_when_skipped(tokenizer: str, tmp_path: Path) -> None:
    file = write(tmp_path / "bad.jsonl", BAD)
    summary = prepare(
        [file], str(tmp_path / "out"), RecordOptions(tokenizer), skip_bad=True, piece_bytes=1
    )
    assert summary["bad_lines"] == 8 and summary["documents"] == 2
    listed = (tmp_path / "out.bad.txt").read_text().splitlines()
    assert len(listed) == len(REASONS)
    for line, reason in zip(listed, REASONS, strict=True):
        assert line.startswith(file + reason)


def test_nothing_usable_is_an_error(tokenizer: str, tmp_path: Path) -> None:
    for records in ([], [{"messages": []}]):
        file = write(tmp_path / "empty.jsonl", records)
        with pytest.raises(ValueError, match=r"empty\.jsonl: no usable record"):
            prepare([file], str(tmp_path / "out"), RecordOptions(tokenizer), skip_bad=True)


def test_a_killed_run_goes_on_where_it_was(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "in.jsonl", [chat(f"It is {i} degrees.") for i in range(20)])
    options, lines = RecordOptions(tokenizer), []
    whole = prepare([file], str(tmp_path / "whole"), options)
    made: list[Path] = []
    write_part = module.write_part

    def killed_after_three(path: Path, *rest: Any) -> None:
        if len(made) == 3:
            path.with_suffix(".1.part").write_bytes(b"torn")
            raise KeyboardInterrupt
        made.append(path)
        write_part(path, *rest)

    monkeypatch.setattr(module, "write_part", killed_after_three)
    with pytest.raises(KeyboardInterrupt):
        prepare([file], str(tmp_path / "out"), options, piece_bytes=300)
    assert not (tmp_path / "out.idx").exists()
    kept = set(made)

    def counted(path: Path, *rest: Any) -> None:
        made.append(path)
        write_part(path, *rest)

    monkeypatch.setattr(module, "write_part", counted)
    resumed = prepare(
        [file], str(tmp_path / "out"), options, piece_bytes=300, progress=lines.append
    )
    assert len(made) == len(set(made)) > 3 and kept < set(made), "no chunk is made twice"
    assert resumed["tokens"] == whole["tokens"]
    for name in ("", "_loss_mask"):
        for suffix in ("bin", "idx"):
            ours, theirs = (tmp_path / f"{p}{name}.{suffix}" for p in ("out", "whole"))
            assert ours.read_bytes() == theirs.read_bytes()
    assert not (tmp_path / "out.parts").exists() and "20 records" in lines[-1]


def test_two_processes_write_the_same_bytes(tokenizer: str, tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{n}.jsonl", [chat(f"{n}: {i} degrees.") for i in range(9)])
        for n in range(2)
    ]
    options = RecordOptions(tokenizer)
    prepare(files, str(tmp_path / "one"), options)
    prepare(files, str(tmp_path / "two"), options, workers=2, piece_bytes=400)
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()
    mask = "_loss_mask.bin"
    assert (tmp_path / f"one{mask}").read_bytes() == (tmp_path / f"two{mask}").read_bytes()


@pytest.mark.slow
def test_workers_end_with_a_killed_run(tokenizer: str, tmp_path: Path) -> None:
    """Killed after a few of 400 pieces, the run is far from its end, and so are its workers."""
    file = write(tmp_path / "in.jsonl", [chat(f"It is {i} degrees.") for i in range(400)])
    prefix, options = str(tmp_path / "out"), RecordOptions(tokenizer)
    program = (
        "from megatron_eagle.data.chat.prepare import prepare\n"
        "from megatron_eagle.data.chat.records import RecordOptions\n"
        f"prepare([{file!r}], {prefix!r}, {options!r}, workers=2, piece_bytes=99)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, start_new_session=True
    ) as run:
        until(lambda: len(list((tmp_path / "out.parts").glob("*.npz"))) > 1)
        run.kill()
    until(lambda: not of_session(run.pid))
    assert not (tmp_path / "out.idx").exists()
    assert 1 < len(list((tmp_path / "out.parts").glob("*.npz"))) < 400
    assert prepare([file], prefix, options, piece_bytes=99)["records"] == 400


def until(condition: Callable[[], Any], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def of_session(leader: int) -> list[int]:
    """Processes of the session that ``leader`` started and that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(stat.parent.name))
    return found


def test_other_options_do_not_reuse_chunks(tokenizer: str, tmp_path: Path) -> None:
    """The scratch folder of a stopped run is no trap for a run with other options."""
    file = write(tmp_path / "in.jsonl", [{"text": "Hello there"}])
    prefix = str(tmp_path / "out")
    (tmp_path / "out.parts").mkdir()
    maker = module.PartMaker(RecordOptions(tokenizer), tmp_path / "out.parts")
    maker.part(FilePiece(file, 0, 99, 1))
    with_eod = load_tokenizer(tokenizer).encode("Hello there")[0]
    summary = prepare([file], prefix, RecordOptions(tokenizer, append_eod=False))
    assert summary["tokens"] == len(with_eod)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokenizer", "absent"], "--tokenizer absent: neither a Hugging Face directory"),
        (["--chat-template", "absent"], "--chat-template absent: no such file"),
        (["--template-options", "[1]"], "--template-options [1]: not a JSON object"),
        (["--input", "absent.jsonl"], "--input absent.jsonl: no such file"),
        (["--template-options", "[" * 9999], "not JSON (maximum recursion depth"),
        (["--template-options", '{"messages": 1}'], "messages is no variable of a template's own"),
        (["--show", "0"], "--show must be at least 1, not 0"),
        (["--workers", "0"], "--workers must be at least 1, not 0"),
        (["--vocab-size", "20"], "is outside the vocabulary's 0 to 19"),
    ],
)
def test_bad_flags_are_refused(
    words: list[str], message: str, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = write(tmp_path / "in.jsonl", [chat("Yes.")])
    common = ["--input", file, "--tokenizer", tokenizer, "--output-prefix", str(tmp_path / "out")]
    assert main([*common, *words]) == 2
    assert message in capsys.readouterr().err


def test_an_existing_data_set_is_kept(tokenizer: str, tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", [chat("Yes.")])
    options, prefix = RecordOptions(tokenizer), str(tmp_path / "out")
    prepare([file], prefix, options)
    with pytest.raises(ValueError, match="exists already; overwrite replaces it"):
        prepare([file], prefix, options)
    prepare([file], prefix, options, overwrite=True)


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    plain = str(templates.make_tokenizer(tmp_path / "plain"))
    file = write(tmp_path / "in.jsonl", [chat("Yes.")])
    with pytest.raises(ValueError, match="has no chat template; give chat_template"):
        prepare([file], str(tmp_path / "out"), RecordOptions(plain))


def test_damaged_data_sets_are_refused(tokenizer: str, tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", [chat("Yes."), chat("No.")])
    prefix = str(tmp_path / "out")
    prepare([file], prefix, RecordOptions(tokenizer))
    with pytest.raises(ValueError, match=r"absent: .*are not both there"):
        IndexedDocuments(str(tmp_path / "absent"), 600)
    whole = (tmp_path / "out.bin").read_bytes()
    (tmp_path / "out.bin").write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=r"out\.bin has \d+ bytes, its index needs"):
        IndexedDocuments(prefix, 600)
    (tmp_path / "out.bin").write_bytes(whole)
    (tmp_path / "out.idx").rename(tmp_path / "kept")
    (tmp_path / "out.idx").write_bytes(b"no index")
    with pytest.raises(ValueError, match=r"out\.idx is damaged"):
        IndexedDocuments(prefix, 600)
    (tmp_path / "kept").replace(tmp_path / "out.idx")
    (tmp_path / "out_loss_mask.idx").unlink()
    with pytest.raises(ValueError, match=r"out_loss_mask\.bin/\.idx are missing"):
        IndexedDocuments(prefix, 600)


def test_a_look_shows_what_is_supervised_and_writes_nothing(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = write(
        tmp_path / "in.jsonl", [BAD[1], chat("It is sunny."), chat("It is windy."), BAD[2]]
    )
    words = ["--input", file, "--tokenizer", tokenizer]
    assert main([*words, "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert f"--- {file}:1: not JSON (" in out and "windy" not in out
    assert "in Paris?<|im_end|>\n<|im_start|>assistant\n>>>It is sunny.<|im_end|><<<" in out
    assert sorted(tmp_path.iterdir()) == [tmp_path / "in.jsonl"]
    assert main(words) == 2
    assert "--output-prefix is missing" in capsys.readouterr().err


def test_what_a_template_leaves_out_is_in_notes_and_summary(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    thoughtful = chat("It is sunny.")
    thoughtful["messages"][1]["reasoning"] = "Hm."
    records = [thoughtful, {**chat("Yes."), "mood": 3}, {"prompt_ids": None, **chat("No.")}]
    file = write(tmp_path / "in.jsonl", records)
    words = ["--input", file, "--tokenizer", tokenizer, "--output-prefix", str(tmp_path / "out")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "note: 1 answers are taught without their thinking: the chat template reads it" in out
    assert "neither this command nor the chat template reads: mood (1)" in out
    counts = json.loads((tmp_path / "out.json").read_text())["counts"]
    assert counts == {"thoughts_without_a_name_in_the_template": 1, "unread_field:mood": 1}


ODD_LINES = [
    (json.dumps([chat("Yes.")]), "not a JSON object but an array; one record a line is wanted"),
    ("[", "not JSON on one line (Expecting value: line 1 column 2 (char 1)); one record a line"),
    ("[" * 100_000, "not JSON on one line (maximum recursion depth"),
    ('{"prompt_ids": [' + "9" * 5000 + '], "answer_ids": [2]}', "not JSON (Exceeds the limit"),
    ('{"text": "rain \\ud83d"}', "not text: surrogates not allowed, '\\ud83d'"),
]


@pytest.mark.parametrize(("line", "reason"), ODD_LINES, ids=range(len(ODD_LINES)))
def test_odd_lines_are_bad_lines(
    line: str, reason: str, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = write(tmp_path / "in.jsonl", [chat("Yes."), line])
    words = ["--input", file, "--tokenizer", tokenizer, "--output-prefix", str(tmp_path / "out")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"error: {file}:2: {reason}" in error and error.count("\n") == 1
    assert main([*words, "--skip-bad-lines"]) == 0
    pair = write(tmp_path / "pair.jsonl", ['{"text": "rain \\ud83d\\ude00"}'])
    assert main(["--input", pair, *words[2:], "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "null"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": 5}'),
        ("config.json", "[]"),
        ("generation_config.json", '{"eos_token_id": "x"}'),
        ("tokenizer_config.json", '{"tokenizer_class": "X", "auto_map": {"AutoTokenizer": '
         '["tokenization_x.X", null]}}'),
    ],
)  # fmt: skip
def test_a_damaged_tokenizer_is_one_line(
    file: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question is asked"))
    folder = templates.make_tokenizer(tmp_path / "tok", templates.SMOLLM2)
    (folder / "tokenization_x.py").write_text("raise SystemExit('code of a directory ran')\n")
    (folder / file).write_text(text)
    data = write(tmp_path / "in.jsonl", [chat("Yes.")])
    words = ["--input", data, "--tokenizer", str(folder), "--output-prefix", str(tmp_path / "out")]
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    source = folder / file if file.startswith("generation") else folder
    assert error.startswith(f"error: --tokenizer {source}: ")
