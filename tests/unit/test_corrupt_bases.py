"""Damaged base directories, of every family: one line each, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_eagle.hf.base.chunks import BaseTensors
from megatron_eagle.hf.base.families import FAMILIES, family_of
from megatron_eagle.hf.base.megatron_args import facts_of
from megatron_eagle.hf.files.weights_dir import WeightsDir
from tests.helpers.refused_import import assert_refused
from tests.helpers.tiny_hf import make_base

INDEX = "model.safetensors.index.json"
NAMES = [family.name for family in FAMILIES.values()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory per family, each in two shards."""
    folder = tmp_path_factory.mktemp("bases")
    for family in NAMES:
        hf = folder / family
        make_base(hf, family)
        weights = load_file(hf / "model.safetensors")
        (hf / "model.safetensors").unlink()
        shards = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(sorted(weights))}
        for file in set(shards.values()):
            held = {name: weights[name] for name in weights if shards[name] == file}
            save_file(held, hf / file)
        (hf / INDEX).write_text(json.dumps({"weight_map": shards}))
    return folder


def absent_shard(hf: Path) -> None:
    (hf / "b.safetensors").unlink()


def truncated_shard(hf: Path) -> None:
    file = hf / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def absent_tensor(hf: Path) -> None:
    edit(hf / INDEX, lambda index: index["weight_map"].update({"model.extra": "a.safetensors"}))


def exchanged_shards(hf: Path) -> None:
    (hf / "a.safetensors").rename(hf / "c")
    (hf / "b.safetensors").rename(hf / "a.safetensors")
    (hf / "c").rename(hf / "b.safetensors")


def pickles(hf: Path) -> None:
    (hf / INDEX).unlink()
    (hf / "a.safetensors").rename(hf / "pytorch_model-00001-of-00001.bin")


def unknown_architecture(hf: Path) -> None:
    edit(hf / "config.json", lambda config: config.update(architectures=["NoneForCausalLM"]))


def fewer_layers(hf: Path) -> None:
    def one_less(config: dict[str, Any]) -> None:
        config["num_hidden_layers"] -= 1
        if config.get("layer_types"):
            config["layer_types"].pop()

    edit(hf / "config.json", one_less)


def other_vocabulary(hf: Path) -> None:
    edit(hf / "config.json", lambda config: config.update(vocab_size=60))


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (absent_shard, "names b.safetensors, which is not in the directory"),
        (truncated_shard, "b.safetensors: truncated or not a safetensors file"),
        (absent_tensor, "names, but its files lack, tensor model.extra"),
        (exchanged_shards, "which the index does not place there"),
        (pickles, "weights are pickles (pytorch_model-00001-of-00001.bin)"),
        (unknown_architecture, "architecture 'NoneForCausalLM' is not supported"),
        (fewer_layers, "has unknown tensor model.layers."),
        (other_vocabulary, "but config.json implies [60, "),
    ],
)
@pytest.mark.parametrize("family", NAMES)
def test_damage_is_one_line_and_leaves_nothing(
    whole: Path, family: str, damage: Callable[[Path], Any], message: str, tmp_path: Path,
    capsys: Any,
) -> None:  # fmt: skip
    assert_refused(whole / family, damage, message, tmp_path, capsys)


@pytest.mark.parametrize("family", NAMES)
def test_every_tensor_is_missed_and_measured(whole: Path, family: str) -> None:
    """Each in turn absent, of another shape, of another dtype: the check names it."""
    source = WeightsDir(whole / family)
    facts = facts_of(source.config, family_of(source.config, "here"), "here")
    expected = BaseTensors(family_of(source.config, "here"), facts).expected()
    source.check(expected, set())
    for name in expected:
        header = source.headers.pop(name)
        with pytest.raises(ValueError, match=f"is missing tensor {name}$"):
            source.check(expected, set())
        source.headers[name] = replace(header, shape=(*header.shape[:-1], header.shape[-1] + 1))
        with pytest.raises(ValueError, match=f"{name} has shape .* implies"):
            source.check(expected, set())
        source.headers[name] = replace(header, dtype="I64")
        with pytest.raises(ValueError, match=f"{name} has dtype I64"):
            source.check(expected, set())
        source.headers[name] = header
