"""tools/import_base.py: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eagle.attention.rope import attention_factor, inverse_frequencies
from megatron_eagle.checkpoint import writer as torch_dist_writer
from megatron_eagle.checkpoint.directory import load_base_json, resolve_checkpoint
from megatron_eagle.checkpoint.hybrid_pattern import megatron_layers
from megatron_eagle.cli.import_base import main
from megatron_eagle.hf.base.families import FAMILIES, family_of
from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.hf.base.megatron_args import megatron_args
from megatron_eagle.hf.base.rope_args import rope_beyond_args
from megatron_eagle.teacher.description import STORED_AS
from megatron_eagle.training.megatron_flags import megatron_flags
from tests.helpers.tiny_hf import MLA, SIZES, make_base

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {**SIZES, "architectures": ["LlamaForCausalLM"]}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def args_of(**fields: Any) -> dict[str, Any]:
    config = {**CONFIG, **fields}
    return megatron_args(config, family_of(config, "config.json"), "config.json")


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    make_base(tmp_path / "hf", "llama")
    return tmp_path / "hf"


def edit_config(hf: Path, **fields: Any) -> None:
    path = hf / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(hf: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(hf / "model.safetensors")
    change(weights)
    save_file(weights, hf / "model.safetensors")


def shard(hf: Path) -> Path:
    """Split the single file into two with an index; returns the index."""
    weights = load_file(hf / "model.safetensors")
    names = sorted(weights)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, held in parts.items():
        save_file({name: weights[name] for name in held}, hf / file)
    (hf / "model.safetensors").unlink()
    index = hf / "model.safetensors.index.json"
    weight_map = {name: file for file, held in parts.items() for name in held}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    path = resolve_checkpoint(directory)
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def test_writes_megatron_tensors_and_description(hf: Path, capsys: Any) -> None:
    save = hf.parent / "base"
    assert main(["--hf", str(hf), "--save", str(save)]) == 0
    weights, stored = load_file(hf / "model.safetensors"), stored_tensors(save)
    assert torch.equal(
        stored["embedding.word_embeddings.weight"], weights["model.embed_tokens.weight"]
    )
    assert "output_layer.weight" not in stored, "tied"
    qkv = stored["decoder.layers.self_attention.linear_qkv.weight"]
    assert qkv.shape == (2, (8 + 2 * 4) * 8, 48)
    q, k = (weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qk")
    assert torch.equal(qkv[1].view(4, 4, 8, 48)[2, 1], q.view(8, 8, 48)[5])
    assert torch.equal(qkv[1].view(4, 4, 8, 48)[2, 2], k.view(4, 8, 48)[2])
    base = load_base_json(save)
    assert (base.family, Path(base.name).name, base.vocab_size) == ("llama", "hf", 61)
    assert Path(base.name).is_absolute()
    assert base.hf_config == json.loads((hf / "config.json").read_text())
    printed = capsys.readouterr().out.splitlines()
    assert any("layer 2/2" in line for line in printed)
    assert printed[-1] == shlex.join(megatron_flags(base.megatron_args))
    assert sorted(path.name for path in hf.parent.iterdir()) == ["base", "hf"]


def test_sharded_directory_and_row_blocks_give_the_same_tensors(
    hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_base(hf, hf.parent / "whole")
    shard(hf)
    monkeypatch.setattr("megatron_eagle.hf.base.chunks.CHUNK_BYTES", 7 * 48 * 4)
    import_base(hf, hf.parent / "blocks")
    whole, blocks = stored_tensors(hf.parent / "whole"), stored_tensors(hf.parent / "blocks")
    assert whole.keys() == blocks.keys()
    assert all(torch.equal(whole[key], blocks[key]) for key in whole)


def test_bf16_weights_stay_bf16(hf: Path) -> None:
    edit_weights(hf, lambda w: w.update({k: v.bfloat16() for k, v in w.items()}))
    import_base(hf, hf.parent / "base")
    assert {value.dtype for value in stored_tensors(hf.parent / "base").values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("architecture", FAMILIES)
def test_printed_flags_are_megatron_s(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.arguments import parse_args

    rope = {"rope_theta": 500000.0, "rope_scaling": LLAMA3}
    for untied, extra in ((True, {}), (False, rope)):
        config = {**CONFIG, "architectures": [architecture], "tie_word_embeddings": untied, **extra}
        config |= {"num_local_experts": 4, "sliding_window": 16, "use_sliding_window": True}
        config |= {"max_window_layers": 1, "mlp_only_layers": [0], "first_k_dense_replace": 1}
        if "Deepseek" in architecture:
            config |= {**MLA, "num_hidden_layers": 2, "use_sliding_window": False}
            config["rope_scaling"] = None
        # Megatron's HybridModel has no rope of type llama3.
        if FAMILIES[architecture].mixers is not None:
            config["rope_scaling"] = None
        args = megatron_args(config, FAMILIES[architecture], "config.json")
        monkeypatch.setattr(sys, "argv", ["train", *megatron_flags(args)])
        parsed = vars(parse_args())
        for name, stored in STORED_AS.items():
            parsed[name] = parsed[stored]
        parsed["window_size"] = list(parsed["window_size"] or []) or None
        expected = args | {"num_layers": megatron_layers(args)}
        assert {name: parsed[name] for name in args} == expected


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {**LLAMA3, "high_freq_factor": 3.0, "original_max_position_embeddings": 512},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096},
        {"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.7, "beta_fast": 24},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "truncate": False},
    ],
)
def test_scaled_rope_equals_hugging_face(rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_theta": 70000.0, **rope}
    config = LlamaConfig(head_dim=64, max_position_embeddings=8192, rope_parameters=dict(rope))
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    for spelling in ({"rope_parameters": rope}, {"rope_scaling": rope, "rope_theta": 70000.0}):
        described = rope_beyond_args({"max_position_embeddings": 8192, **spelling}, "config.json")
        torch.testing.assert_close(inverse_frequencies(described, 64), expected)
        assert attention_factor(described) == pytest.approx(factor)


def test_llama3_rope_equals_hugging_face() -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    args = args_of(rope_theta=500000.0, rope_scaling=LLAMA3, head_dim=64)
    rope = RotaryEmbedding(
        args["kv_channels"],
        args["rotary_percent"],
        rotary_base=args["rotary_base"],
        rope_scaling=args["use_rope_scaling"],
        rope_scaling_factor=args["rope_scaling_factor"],
        use_cpu_initialization=True,
    )
    config = LlamaConfig(head_dim=64, rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    torch.testing.assert_close(rope.inv_freq, ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported"),
        ({"architectures": None}, "must name exactly one class"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": "yarn"}}, "factor must be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor must be a positive number"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "low_freq_factor >= high_freq"),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "factor must be a positive number"),
        ({"rope_theta": 10000.5}, "rope_theta = 10000.5"),
        ({"rope_parameters": {"full_attention": {}}}, "per layer type"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        (
            {"architectures": ["MistralForCausalLM"], "attention_bias": True},
            "attention_bias = True is not supported",
        ),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": "48"}, "hidden_size must be a positive integer"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"layer_types": ["linear_attention"]}, "layer_types"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 1},
            "sliding_window = 1 is not supported",
        ),
        (
            {"architectures": ["GptOssForCausalLM"], "swiglu_limit": 5.0},
            "swiglu_limit = 5.0 is not supported",
        ),
        (
            {"architectures": ["DeepseekV3ForCausalLM"], **MLA, "norm_topk_prob": False},
            "norm_topk_prob = False is not supported",
        ),
        (
            {"architectures": ["DeepseekV3ForCausalLM"], **MLA, "num_key_value_heads": 4},
            "num_key_value_heads must be num_attention_heads 8, found 4",
        ),
        (
            {"architectures": ["DeepseekV3ForCausalLM"], **MLA, "rope_scaling": LLAMA3},
            "'llama3' is not supported with latent attention",
        ),
        (
            {"architectures": ["DeepseekV3ForCausalLM"], **MLA, "n_group": 3},
            "n_group 3 and topk_group 2 do not fit",
        ),
        (
            {"architectures": ["DeepseekV2ForCausalLM"], **MLA, "topk_method": "noaux_tc"},
            "topk_method 'noaux_tc' is not supported",
        ),
        (
            {"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 1},
            "top-1 router is not supported",
        ),
    ],
)
def test_unsupported_config_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        args_of(**fields)


def test_sliding_windows_become_megatrons() -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert args_of(**mistral, sliding_window=16)["window_size"] == [15, 0]
    assert "window_attn_skip_freq" not in args_of(**mistral, sliding_window=16)
    for without in (None, 64):
        assert "window_size" not in args_of(**mistral, sliding_window=without)
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 16}
    assert "window_size" not in args_of(**qwen)
    assert "window_size" not in args_of(**qwen, use_sliding_window=True)  # from layer 28 on
    upper = args_of(**qwen, use_sliding_window=True, max_window_layers=1)
    assert upper["window_attn_skip_freq"] == [0, 1]


def no_config(hf: Path) -> None:
    (hf / "config.json").unlink()


def broken_config(hf: Path) -> None:
    (hf / "config.json").write_text('{"architectures": [')


def config_without_size(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    del config["num_hidden_layers"]
    (hf / "config.json").write_text(json.dumps(config))


def truncated_file(hf: Path) -> None:
    file = hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def header_only_garbage(hf: Path) -> None:
    (hf / "model.safetensors").write_bytes(b"\xff" * 64)


def absent_shard(hf: Path) -> None:
    shard(hf)
    (hf / "b.safetensors").unlink()


def truncated_shard(hf: Path) -> None:
    shard(hf)
    (hf / "b.safetensors").write_bytes((hf / "b.safetensors").read_bytes()[:-100])


def index_names_absent_tensor(hf: Path) -> None:
    index = shard(hf)
    value = json.loads(index.read_text())
    value["weight_map"]["model.extra"] = "a.safetensors"
    index.write_text(json.dumps(value))


def index_leaves_directory(hf: Path) -> None:
    index = shard(hf)
    index.write_text(index.read_text().replace("a.safetensors", "../a.safetensors"))


def missing_tensor(hf: Path) -> None:
    edit_weights(hf, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))


def missing_head(hf: Path) -> None:
    edit_config(hf, tie_word_embeddings=False)


def unknown_tensor(hf: Path) -> None:
    edit_weights(hf, lambda w: w.update({"model.layers.0.extra.weight": torch.zeros(2)}))


def extra_layer(hf: Path) -> None:
    edit_config(hf, num_hidden_layers=1)


def wrong_shape(hf: Path) -> None:
    edit_config(hf, vocab_size=60)


def wrong_dtype(hf: Path) -> None:
    edit_weights(hf, lambda w: w.update({"model.norm.weight": w["model.norm.weight"].long()}))


def mixed_dtype(hf: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_weights(hf, lambda w: w.update({name: w[name].bfloat16()}))


def only_pickles(hf: Path) -> None:
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")


def no_weights(hf: Path) -> None:
    (hf / "model.safetensors").unlink()


def absent_directory(hf: Path) -> None:
    hf.rename(hf.parent / "elsewhere")


def save_in_use(hf: Path) -> None:
    (hf.parent / "base").mkdir()
    (hf.parent / "base" / "file").touch()


def save_is_a_file(hf: Path) -> None:
    (hf.parent / "base").touch()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_config, "config.json: no such file"),
        (broken_config, "config.json: not valid JSON"),
        (config_without_size, "num_hidden_layers must be a positive integer"),
        (truncated_file, "model.safetensors: truncated or not a safetensors file"),
        (header_only_garbage, "model.safetensors: truncated or not a safetensors file"),
        (absent_shard, "names b.safetensors, which is not in the directory"),
        (truncated_shard, "b.safetensors: truncated"),
        (index_names_absent_tensor, "model.extra"),
        (index_leaves_directory, "weight_map must map tensor names to files beside it"),
        (missing_tensor, "missing tensor model.layers.1.mlp.up_proj.weight"),
        (missing_head, "missing tensor lm_head.weight"),
        (unknown_tensor, "unknown tensor model.layers.0.extra.weight"),
        (extra_layer, "unknown tensor model.layers.1."),
        (wrong_shape, "model.embed_tokens.weight has shape [61, 48]"),
        (wrong_dtype, "model.norm.weight has dtype I64"),
        (mixed_dtype, "differ in dtype"),
        (only_pickles, "pytorch_model.bin"),
        (no_weights, "neither model.safetensors nor"),
        (absent_directory, "no such directory"),
        (save_in_use, "not empty"),
        (save_is_a_file, "is not a directory"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    hf: Path, damage: Callable[[Path], Any], message: str, capsys: Any
) -> None:
    damage(hf)
    before = sorted(hf.parent.rglob("*"))
    assert main(["--hf", str(hf), "--save", str(hf.parent / "base")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    assert sorted(hf.parent.rglob("*")) == before


def test_a_write_that_fails_leaves_nothing(
    hf: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    class FullDisk(torch_dist_writer.dcp.FileSystemWriter):
        def write_data(self, *args: Any) -> Any:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch_dist_writer.dcp, "FileSystemWriter", FullDisk)
    assert main(["--hf", str(hf), "--save", str(hf.parent / "base")]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
    assert [path.name for path in hf.parent.iterdir()] == ["hf"]


def test_command_line_exits_2_without_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "tools/import_base.py", "--hf", str(tmp_path / "none")]
    done = subprocess.run(
        [*command, "--save", str(tmp_path / "base")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'none'}: no such directory\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "not a megatron_eagle.base"),
        ({"vocab_size": "61"}, "vocab_size must be of type int"),
    ],
)
def test_foreign_base_json_is_refused(hf: Path, change: dict[str, Any], message: str) -> None:
    import_base(hf, hf.parent / "base")
    path = hf.parent / "base" / "eagle_base.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_base_json(hf.parent / "base")


def test_unusable_checkpoint_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such base checkpoint directory"):
        load_base_json(tmp_path / "none")
    with pytest.raises(ValueError, match=r"eagle_base.json is missing"):
        load_base_json(tmp_path)
    with pytest.raises(ValueError, match=r"latest_checkpointed_iteration.txt is missing"):
        resolve_checkpoint(tmp_path)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("latest")
    with pytest.raises(ValueError, match="expected 'release' or an iteration"):
        resolve_checkpoint(tmp_path)
    tracker.write_text("100")
    with pytest.raises(ValueError, match=r"iter_0000100: incomplete"):
        resolve_checkpoint(tmp_path)
