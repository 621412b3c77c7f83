"""Commands killed at each file operation: the same command finishes them, and nothing stays."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_eagle.checkpoint.directory import BASE_JSON_NAME
from megatron_eagle.hf.base.stitch import MARK
from tests.e2e.conftest import Inputs
from tests.helpers.exported_draft import exported
from tests.helpers.hf_directories import byte_tokenizer, chat_model
from tests.helpers.killed import run_killed
from tests.helpers.tiny_hf import make_base
from tests.helpers.trained_draft import TrainedDraft

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
CHATS = json.dumps({"messages": [{"role": r, "content": "hi"} for r in ("user", "assistant")]})


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files below ``folder``, hidden ones too."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def kill_everywhere(
    words: list[str], place: Path, scratch: Path, prepare: Callable[[], None] = lambda: None
) -> None:
    """Kill the command at each of its operations in ``place``, and run it again after each."""

    def begin() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        prepare()

    begin()
    status, operations, printed = run_killed(words, place, scratch)
    assert status == 0 and operations > 3, printed
    expected = contents(place)
    for at in range(1, operations + 1):
        begin()
        status, _, printed = run_killed(words, place, scratch, at)
        assert status == -9, f"killed at {at}: {status}, {printed}"
        status, _, printed = run_killed(words, place, scratch)
        left = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
        assert status == 0, f"killed at {at} of {operations}, again: {printed}{left}"
        found = contents(place)
        assert found.keys() == expected.keys(), f"killed at {at} of {operations}: {left}"
        differing = [name for name in found if found[name] != expected[name]]
        assert all(is_stamped(name) for name in differing), f"killed at {at}: {differing}"


def is_stamped(name: str) -> bool:
    """Whether two runs write different bytes: PyTorch puts a random id into checkpoint metadata."""
    return name.endswith(".metadata")


def test_import_base(inputs: Inputs, tmp_path: Path) -> None:
    place = tmp_path / "place"
    words = ["import-base", "--hf", str(inputs.hf), "--save", str(place / "base")]
    kill_everywhere(words, place, tmp_path)


@pytest.mark.parametrize("replaced", [False, True])
def test_convert(replaced: bool, tmp_path: Path) -> None:
    place, draft = tmp_path / "place", tmp_path / "draft"
    TrainedDraft.make().save(draft)
    words = ["convert", "--load", str(draft), "--output", str(place / "hf")]
    words += ["--overwrite"] if replaced else []

    def prepare() -> None:
        if replaced:
            shutil.copytree(tmp_path / "earlier", place / "hf")

    if replaced:
        TrainedDraft.make(layers=2).save(tmp_path / "other")
        earlier = ["convert", "--load", str(tmp_path / "other"), "--output"]
        status, _, printed = run_killed([*earlier, str(tmp_path / "earlier")], place, tmp_path)
        assert status == 0, printed
    kill_everywhere(words, place, tmp_path, prepare)


def test_import_draft(tmp_path: Path) -> None:
    place, base = tmp_path / "place", tmp_path / "base"
    draft, directory = exported(tmp_path, "hf")
    base.mkdir()
    (base / BASE_JSON_NAME).write_text(json.dumps(draft.metadata["base"]))
    words = ["import-draft", "--hf", str(directory), "--base", str(base)]
    kill_everywhere([*words, "--save", str(place / "draft")], place, tmp_path)


def test_stitch(tmp_path: Path) -> None:
    place, hf, module, prefix = (
        tmp_path / "place",
        tmp_path / "hf",
        tmp_path / "m",
        "model.layers.1.",
    )
    make_base(hf, "llama", num_hidden_layers=2)
    tensors = load_file(hf / "model.safetensors")
    trained = {name: 2 * tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    module.mkdir()
    save_file(trained, module / "model.safetensors", {"format": "pt"})
    config = {**json.loads((hf / "config.json").read_text()), MARK: {"prefix": prefix}}
    (module / "config.json").write_text(json.dumps(config))
    words = ["stitch", "--hf", str(hf), "--module", str(module), "--save", str(place / "new")]
    kill_everywhere(words, place, tmp_path)
    found = load_file(place / "new" / "model.safetensors")
    assert all(found[name].equal(trained.get(name, tensors[name])) for name in tensors)


def test_prepare_data(tmp_path: Path) -> None:
    place = tmp_path / "place"
    (tmp_path / "chats.jsonl").write_text(f"{CHATS}\n" * 20 + "not a line\n")
    words = ["prepare-data", "--input", str(tmp_path / "chats.jsonl"), "--skip-bad-lines"]
    words += ["--tokenizer", str(byte_tokenizer(tmp_path / "tokenizer"))]
    kill_everywhere([*words, "--output-prefix", str(place / "data")], place, tmp_path)


def test_regenerate(tmp_path: Path) -> None:
    place = tmp_path / "place"
    lines = [json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    words = ["regenerate", "--model", str(chat_model(tmp_path / "model"))]
    words += ["--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(place / "a.jsonl")]
    words += ["--max-new-tokens", "4", "--batch-size", "2", "--temperature", "1.0"]
    kill_everywhere(words, place, tmp_path)


def test_extract_features(inputs: Inputs, tmp_path: Path) -> None:
    place = tmp_path / "place"
    words = ["extract-features", "--base", str(inputs.base), "--data", str(inputs.answers)]
    words += ["--seq-length", "32", "--output", str(place / "features")]
    kill_everywhere(words, place, tmp_path)
