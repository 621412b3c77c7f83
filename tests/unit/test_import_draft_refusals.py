"""What the import of a draft refuses: each defect with one clear line, nothing left behind."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_eagle.hf.draft.checkpoint import write_draft_checkpoint
from tests.helpers.exported_draft import exported, imported, rewrite

Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


def import_error(folder: Path, change: Change, layout: str = "hf", **shape: Any) -> str:
    """The error of importing an exported draft after `change`; nothing may be left behind."""
    draft, directory = exported(folder, layout, **shape)
    rewrite(directory, change)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError) as error:
        write_draft_checkpoint(imported(directory, draft), folder / "back")
    assert sorted(folder.rglob("*")) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def fields(**values: Any) -> Change:
    return lambda config, tensors: config.update(values)


FIELDS = [
    ({"architectures": ["MedusaModel"]}, "architecture 'MedusaModel' is not an EAGLE draft"),
    ({"architectures": []}, "architectures must name exactly one class"),
    ({"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, "kv_lora_rank must be a positive"),
    ({"kv_lora_rank": 512}, "kv_lora_rank = 512 in a draft of Llama type"),
    ({"attention_bias": True}, "attention_bias = True is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not supported"),
    ({"hidden_size": 32}, "hidden_size is 32, the base tiny-base has 24"),
    ({"target_hidden_size": 48}, "target_hidden_size is 48"),
    ({"vocab_size": 64}, "vocab_size is 64, the base tiny-base has 53"),
    ({"head_dim": 12}, "self_attn.q_proj.weight has shape [60, 48], but"),
    ({"intermediate_size": 15}, "mlp.gate_proj.weight has shape [14, 24], but"),
    ({"num_key_value_heads": 4}, "do not divide the draft's 6 attention heads"),
    ({"num_hidden_layers": 2}, "incomplete draft"),
    ({"draft_vocab_size": 20}, "d2t must hold 20 integers"),
    ({"draft_vocab_size": "all"}, "draft_vocab_size must be a positive integer"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported"),
    ({"fc_norm": "false"}, "fc_norm must be true or false, found 'false'"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number"),
    ({"eagle_aux_hidden_state_layer_ids": [1, 4, 7]}, "name different layers"),
    ({"eagle_config": {}, "eagle_aux_hidden_state_layer_ids": [0, 4, 7]}, "must ascend and be"),
    ({"eagle_config": [1]}, "eagle_config must be an object"),
    ({"layer_types": ["sliding_attention"]}, "layer_types ['sliding_attention'] is not supported"),
    ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
    ({"fc_norm": True}, "fc_norm without norm_output"),
    ({"norm_output": True}, "norm_output without fc_norm"),
    ({"fc_norm": True, "norm_output": True}, "incomplete draft, fc_norm.0.weight"),
    ({"fc_norm": True, "norm_output": True, "norm_before_fc": True}, "norm_before_fc"),
    ({"norm_before_fc": True}, "incomplete draft, input_norm.weight missing"),
]


@pytest.mark.parametrize(("values", "words"), FIELDS, ids=lambda value: str(value)[:50])
def test_a_config_with_an_unsupported_field_is_refused(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    text = import_error(tmp_path, fields(**values))
    assert text.startswith(str(tmp_path / "hf")) and words in text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"speculators_model_type": "medusa"}, "speculators_model_type 'medusa' is not supported"),
        ({"transformer_layer_config": None}, "transformer_layer_config is missing"),
        ({"transformer_layer_config": {"model_type": "qwen2"}}, "of type 'qwen2' is not"),
    ],
)
def test_a_speculators_config_with_an_unsupported_field_is_refused(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    assert words in import_error(tmp_path, fields(**values), "speculators")


def test_speculators_must_say_the_flag_whose_default_differs(tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del config["norm_before_residual"]

    assert "norm_before_residual is missing" in import_error(tmp_path, change, "speculators")


def replaced(name: str, value: Tensor | None) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors.pop(name)
        if value is not None:
            tensors[name] = value

    return change


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("norm.weight", None, "incomplete draft, norm.weight missing"),
        ("lm_head.weight", None, "incomplete draft, lm_head.weight missing"),
        ("fc.weight", torch.ones(24, 48), "fc.weight has shape [24, 48], but"),
        ("norm.weight", torch.ones(24, dtype=torch.int64), "norm.weight has dtype torch.int64"),
        ("norm.weight", torch.ones(24, dtype=torch.float64), "norm.weight has dtype F64"),
        ("norm.weight", torch.full((24,), float("nan")), "norm.weight holds NaN"),
        ("layers.1.hidden_norm.weight", torch.ones(24), "and layers.1.hidden_norm.weight differ"),
        ("d2t", None, "d2t is missing: 19 of 53 ids, but not which"),
        ("d2t", torch.zeros(19), "d2t must hold 19 integers, found torch.float32"),
        ("d2t", torch.full((19,), 40), "reach from 40 to 58"),
        ("d2t", torch.tensor([5, *[0] * 18]), "not ascending"),
        ("t2d", torch.ones(53, dtype=torch.bool), "t2d and d2t name different token ids"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, value: Tensor | None, words: str
) -> None:
    assert words in import_error(tmp_path, replaced(name, value), layers=2)


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["fc.bias"] = torch.zeros(24)

    assert "fc.bias unknown in an eagle3 draft" in import_error(tmp_path, change)


def test_aux_layers_that_contradict_the_files_are_refused(tmp_path: Path) -> None:
    draft, directory = exported(tmp_path)
    with pytest.raises(ValueError, match=r"reads aux layers \[1, 4, 7\], not \[0, 4, 7\]"):
        imported(directory, draft, aux_layers=(0, 4, 7))


def test_truncated_and_missing_files_are_refused(tmp_path: Path) -> None:
    draft, directory = exported(tmp_path)
    with pytest.raises(ValueError, match="no such directory"):
        imported(tmp_path / "absent", draft)
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: truncated"):
        imported(directory, draft)
    weights.unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor"):
        imported(directory, draft)
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json: no such file"):
        imported(directory, draft)


def test_sharded_files_are_read_and_a_missing_shard_is_refused(tmp_path: Path) -> None:
    draft, directory = exported(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    index = {name: file for file, held in shards.items() for name in held}
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    assert imported(directory, draft).tensors["draft.norm.weight"]().equal(draft.hf["norm.weight"])
    (directory / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names b.safetensors, which is not in the directory"):
        imported(directory, draft)


class Payload:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_pickles_run_no_code(tmp_path: Path) -> None:
    draft, directory = exported(tmp_path)
    (directory / "model.safetensors").unlink()
    pickled = directory / "pytorch_model.bin"
    torch.save({"norm.weight": Payload(tmp_path / "ran")}, pickled)
    with pytest.raises(ValueError, match="a pickle of more than tensors, which is never loaded"):
        imported(directory, draft)
    pickled.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ValueError, match="a pickle of more than tensors, which is never loaded"):
        imported(directory, draft)
    assert not (tmp_path / "ran").exists()
    torch.save({"norm.weight": 3}, pickled)
    with pytest.raises(ValueError, match="does not hold tensors by name"):
        imported(directory, draft)


def test_a_checkpoint_directory_in_use_is_refused(tmp_path: Path) -> None:
    draft, directory = exported(tmp_path)
    stored = imported(directory, draft)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"save .*exists and is not a directory"):
        write_draft_checkpoint(stored, tmp_path / "file")
    with pytest.raises(ValueError, match=r"save .*not empty"):
        write_draft_checkpoint(stored, directory)
