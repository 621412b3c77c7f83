"""What the conversion of a draft refuses: each defect with one clear line, nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_eagle.hf.draft.export import export_draft
from tests.helpers.trained_draft import TrainedDraft, chunked, save_iteration


def export_error(tmp_path: Path, draft: TrainedDraft, **options: Any) -> str:
    """The error of converting `draft`; nothing may be left behind."""
    draft.save(tmp_path / "ckpt")
    return conversion_error(tmp_path, **options)


def conversion_error(tmp_path: Path, **options: Any) -> str:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as error:
        export_draft(tmp_path / "ckpt", tmp_path / "hf", **options)
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("key", sorted(TrainedDraft.make(layers=2).stored))
def test_a_missing_tensor_is_refused(tmp_path: Path, key: str) -> None:
    draft = TrainedDraft.make(layers=2)
    del draft.stored[key]
    assert export_error(tmp_path, draft).endswith(f"incomplete draft, {key} missing")


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    save_iteration(tmp_path / "ckpt", chunked({"decoder.final_layernorm.weight": torch.ones(24)}))
    assert "holds no draft" in conversion_error(tmp_path)


def test_an_unexpected_tensor_is_refused(tmp_path: Path) -> None:
    draft = TrainedDraft.make()
    draft.stored["draft.fc_norm.0.weight"] = torch.ones(24)
    assert "draft.fc_norm.0.weight unexpected" in export_error(tmp_path, draft)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"algorithm": "eagle3.1"}, "incomplete draft, draft.fc_norm.0.weight"),
        ({"norm_before_fc": True}, "incomplete draft, draft.input_norm.weight missing"),
    ],
)
def test_norms_that_are_not_there_are_missed(
    tmp_path: Path, option: dict[str, Any], words: str
) -> None:
    draft = TrainedDraft.make()
    draft.metadata["spec"] |= option
    assert words in export_error(tmp_path, draft)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("draft.fc.weight", (24, 48)),
        ("draft.lm_head.weight", (18, 24)),
        ("draft.lm_head.weight", (32, 23)),
        ("draft.norm.weight", (25,)),
        ("draft.norm.weight", (24, 1)),
    ],
)
def test_a_wrong_shape_is_refused(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    draft = TrainedDraft.make()
    draft.stored[key] = torch.ones(shape)
    assert f"{key} has shape {shape}, expected" in export_error(tmp_path, draft)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite(tmp_path: Path, value: float) -> None:
    draft = TrainedDraft.make()
    draft.stored["draft.fc.weight"] = draft.hf["fc.weight"].clone()
    draft.stored["draft.fc.weight"][3, 5] = value
    assert "draft.fc.weight: holds NaN or infinite" in export_error(tmp_path, draft)


def test_weights_that_overflow_the_asked_dtype_are_refused(tmp_path: Path) -> None:
    draft = TrainedDraft.make()
    draft.stored["draft.norm.weight"] = torch.full((24,), 1e6)
    text = export_error(tmp_path, draft, dtype=torch.float16)
    assert "draft.norm.weight: values overflow with dtype float16" in text


def test_mixed_dtypes_need_a_choice(tmp_path: Path) -> None:
    draft = TrainedDraft.make()
    draft.stored["draft.norm.weight"] = draft.stored["draft.norm.weight"].bfloat16()
    text = export_error(tmp_path, draft)
    assert text.endswith("holds bfloat16 and float32 weights; choose one with dtype")
    export_draft(tmp_path / "ckpt", tmp_path / "hf", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (18, 53, "the base has ids 0 to 52"),
        (0, -1, "the base has ids 0 to 52"),
        (5, 0, "are not ascending"),
    ],
)
def test_vocab_ids_that_do_not_ascend_or_fit_are_refused(
    tmp_path: Path, position: int, value: int, words: str
) -> None:
    draft = TrainedDraft.make()
    draft.stored["draft.vocab_ids"][position] = value
    text = export_error(tmp_path, draft)
    assert "draft.vocab_ids: " in text and words in text


def test_repeated_vocab_ids_are_refused(tmp_path: Path) -> None:
    draft = TrainedDraft.make()
    ids = draft.stored["draft.vocab_ids"]
    ids[3] = ids[2]
    assert "are not ascending" in export_error(tmp_path, draft)


def test_vocab_ids_of_another_dtype_or_length_are_refused(tmp_path: Path) -> None:
    draft = TrainedDraft.make()
    draft.stored["draft.vocab_ids"] = draft.stored["draft.vocab_ids"].int()
    assert "must be int64" in export_error(tmp_path / "dtype", draft)
    draft.stored["draft.vocab_ids"] = torch.arange(20)
    assert "has shape (20,), expected 19" in export_error(tmp_path / "length", draft)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["format"], "another", "'another' version 2"),
        (["version"], 3, "version 3"),
        (["base", "format"], "another", "not a megatron_eagle.base description"),
        (["base"], None, "not a megatron_eagle.base description"),
        (["base", "megatron_args", "kv_channels"], "64", "kv_channels must be a positive integer"),
        (["base", "hf_config", "max_position_embeddings"], None, "max_position_embeddings must be"),
        (["base", "megatron_args", "rotary_base"], None, "rotary_base must be a positive number"),
        (["ttt_steps"], 0, "ttt_steps must be a positive integer"),
        (["spec", "num_layers"], 0, "num_layers must be at least 1"),
        (["spec", "draft_vocab_size"], 54, "exceeds the base's vocabulary of 53"),
        (["spec", "aux_layers"], [4, 1, 7], "must ascend"),
        (["spec", "aux_layers"], [1, 4, 11], "lie in the base's 11 layers"),
        (["spec", "aux_layers"], [], "needs at least one layer"),
        (["spec", "aux_layers"], None, "must be a list of layer numbers"),
        (["spec"], {"norm_output": True}, "unknown field 'norm_output'"),
        (["spec"], None, "spec is missing"),
    ],
)
def test_impossible_metadata_are_refused(
    tmp_path: Path, path: list[str], value: Any, words: str
) -> None:
    draft = TrainedDraft.make()
    target = draft.metadata
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    text = export_error(tmp_path, draft)
    assert "draft.metadata" in text and words in text


def test_damaged_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    directory = TrainedDraft.make().save(tmp_path / "ckpt")
    (shard,) = directory.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-2000])
    assert "shard file is truncated" in conversion_error(tmp_path)
    shard.unlink()
    assert "shard file is missing" in conversion_error(tmp_path)


def test_failing_write_leaves_the_earlier_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TrainedDraft.make().save(tmp_path / "ckpt")
    export_draft(tmp_path / "ckpt", tmp_path / "hf")
    before = {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()}

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("megatron_eagle.hf.draft.export.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        export_draft(tmp_path / "ckpt", tmp_path / "hf", overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]


def test_an_output_in_use_is_refused(tmp_path: Path) -> None:
    draft = TrainedDraft.make()
    draft.save(tmp_path / "ckpt")
    output = tmp_path / "hf"
    output.mkdir()
    export_draft(tmp_path / "ckpt", output)
    assert "not empty; give overwrite" in conversion_error(tmp_path)
    (output / "left_over").write_text("")
    export_draft(tmp_path / "ckpt", output, dtype=torch.bfloat16, overwrite=True)
    assert not (output / "left_over").exists()
    assert load_file(output / "model.safetensors")["fc.weight"].dtype == torch.bfloat16
    (output / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert "replaces only an exported draft" in conversion_error(tmp_path, overwrite=True)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    TrainedDraft.make().save(tmp_path / "ckpt")
    (tmp_path / "hf").write_text("")
    assert "is not a directory" in conversion_error(tmp_path, overwrite=True)
