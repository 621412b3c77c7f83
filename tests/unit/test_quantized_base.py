"""Bases that ship quantized: what their weights mean, and what is refused of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_eagle.checkpoint.directory import load_base_json
from megatron_eagle.hf.base.chunks import BaseTensors
from megatron_eagle.hf.base.families import family_of
from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.hf.base.megatron_args import facts_of, megatron_args
from megatron_eagle.hf.files.packed_weights import Fp8Weight, Mxfp4Weight
from megatron_eagle.hf.files.weights_dir import WeightsDir
from tests.helpers.quantize import fp8_blocks, fp8_directory, mxfp4_directory
from tests.helpers.refused_import import assert_refused
from tests.helpers.tiny_hf import make_base

DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def reader(tensors: dict[str, Tensor]) -> Callable[[str, int, int | None], Tensor]:
    return lambda name, start, stop: (
        tensors[name][start:stop] if tensors[name].ndim else tensors[name]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4_is_transformers_bit_by_bit(dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).repeat(2, 15, 1).view(2, 15, 16, 16)
    scales = torch.arange(240, dtype=torch.uint8).view(1, 15, 16).repeat(2, 1, 1)
    scales[1] += 15  # up to 254; 255 is not a number
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    load = reader({"b": blocks, "s": scales})
    packed = Mxfp4Weight("b", "s", (2, 512, 15))
    assert packed.read(load, 0, 2, dtype).equal(expected)
    assert packed.read(load, 1, 2, dtype).equal(expected[1:])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_fp8_is_transformers_bit_by_bit(dtype: torch.dtype) -> None:
    """Whose output has the scales' dtype; it takes whole blocks only."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale, _ = fp8_blocks(torch.randn(320, 96), (64, 32))
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale.to(dtype))
    packed = Fp8Weight("w", "s", (320, 96), (64, 32))
    load = reader({"w": weight, "s": scale.to(dtype)})
    assert packed.read(load, 0, 320, dtype).equal(expected)
    assert packed.read(load, 70, 211, dtype).equal(expected[70:211])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize(
    ("shape", "block"), [((3, 2), (7, 6)), ((), (20, 10)), ((20, 1), (1, 10)), ((20,), (1, 10))]
)
def test_fp8_scales_may_have_any_grid(
    shape: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(20, 10).to(torch.float8_e4m3fn)
    scale = torch.rand(shape).add(0.1).to(dtype)
    grid = scale.float().reshape(scale.shape[0] if shape else 1, -1)
    expected = torch.empty(20, 10)
    for row in range(20):
        for column in range(10):
            factor = grid[row // block[0], column // block[1]]
            expected[row, column] = weight[row, column].float() * factor
    packed = Fp8Weight("w", "s", (20, 10), block)
    load = reader({"w": weight, "s": scale})
    assert packed.read(load, 0, 20, torch.float32).equal(expected)
    assert packed.read(load, 6, 15, torch.bfloat16).equal(expected[6:15].bfloat16())


def quantized(folder: Path, family: str) -> dict[str, Tensor]:
    """A quantized directory ``folder``; returns what it means."""
    sizes = {"hidden_size": 64, "intermediate_size": 96} if family == "gpt_oss" else {}
    make_base(folder, family, **sizes)
    return mxfp4_directory(folder) if family == "gpt_oss" else fp8_directory(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    for family in ("qwen3", "gpt_oss"):
        quantized(folder / family, family)
    return folder


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_directory_reads_as_the_floats_it_stands_for(family: str, tmp_path: Path) -> None:
    meant = quantized(tmp_path / "hf", family)
    source = WeightsDir(tmp_path / "hf")
    assert source.headers.keys() == meant.keys() and source.quant_method is not None
    for name, tensor in meant.items():
        assert source.headers[name].shape == tuple(tensor.shape) and source.tensor(name).equal(
            tensor
        )
        assert source.tensor(name, 1, 3).equal(tensor[1:3]), name


def test_the_imported_base_is_that_of_the_floats(tmp_path: Path) -> None:
    """Down to the fingerprint; and it no longer calls itself quantized."""
    meant = quantized(tmp_path / "hf", "gpt_oss")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    packed = import_base(tmp_path / "hf", tmp_path / "packed")
    save_file(meant, tmp_path / "hf" / "model.safetensors")
    del config["quantization_config"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    plain = import_base(tmp_path / "hf", tmp_path / "plain")
    assert packed == plain == load_base_json(tmp_path / "packed")


def test_kimi_k2_is_a_deepseek_v3() -> None:
    """Its config.json as published: DeepSeek-V3's class under another model_type, one group."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "hidden_act": "silu",
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 64, "num_key_value_heads": 64,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "n_routed_experts": 384, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
        "routed_scaling_factor": 2.827, "num_nextn_predict_layers": 0, "vocab_size": 163840,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 50000.0,
        "rope_scaling": {
            "type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
            "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    family = family_of(config, "config.json")
    args = megatron_args(config, family, "config.json")
    assert family.name == "deepseek_v3"
    assert (args["num_experts"], args["moe_router_topk"], args["num_layers"]) == (384, 8, 61)
    assert args["moe_layer_freq"] == [0] + 60 * [1] and "moe_router_num_groups" not in args
    shapes = BaseTensors(family, facts_of(config, family, "config.json")).expected()
    assert shapes["model.layers.60.mlp.experts.383.down_proj.weight"] == (7168, 2048)
    assert shapes["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)


def test_dtype_is_the_models(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "qwen3", tmp_path, dirs_exist_ok=True)
    name = "model.layers.0.mlp.up_proj.weight"
    for field, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        edit_config(tmp_path, dtype=field)
        assert WeightsDir(tmp_path).dtype(name) == WeightsDir(tmp_path).tensor(name).dtype == dtype
    edit_config(tmp_path, dtype=None, torch_dtype=None)
    assert WeightsDir(tmp_path).dtype(name) == torch.bfloat16


def edit_config(hf: Path, **fields: Any) -> None:
    path = hf / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_quantization(**fields: Any) -> Callable[[Path], None]:
    def edit(hf: Path) -> None:
        given = json.loads((hf / "config.json").read_text())["quantization_config"]
        edit_config(hf, quantization_config={**given, **fields})

    return edit


def edit_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(hf: Path) -> None:
        weights = load_file(hf / "model.safetensors")
        change(weights)
        save_file({k: v.contiguous() for k, v in weights.items()}, hf / "model.safetensors")

    return edit


UP = "model.layers.1.mlp.up_proj.weight"
SCALE = f"{UP}_scale_inv"
EXPERTS = "model.layers.1.mlp.experts.down_proj"
FP8_DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    *[
        (edit_quantization(quant_method=method), f"quantization_config.quant_method = '{method}'")
        for method in ("awq", "gptq", "compressed-tensors", "bitsandbytes")
    ],
    (edit_quantization(quant_method=None), "quantization_config.quant_method = None"),
    (lambda hf: edit_config(hf, quantization_config=[8]), "quant_method = None"),
    (lambda hf: edit_config(hf, dtype="int8"), "torch_dtype = 'int8' is not supported"),
    (lambda hf: edit_config(hf, quantization_config=None), "unknown tensor model.layers.0"),
    (edit_quantization(fmt="e5m2"), "fmt = 'e5m2'"),
    (edit_quantization(weight_block_size=[16]), "weight_block_size must be two positive integers"),
    (edit_quantization(weight_block_size=[16, 16]), "weight_block_size [16, 16] implies"),
    (edit_quantization(weight_block_size=None), "weight_block_size None implies"),
    (edit_weights(lambda w: w.pop(SCALE)), f"{UP} lacks its scales, {SCALE}"),
    (edit_weights(lambda w: w.pop(UP)), f"{SCALE} scales {UP}, which is missing"),
    (edit_weights(lambda w: w.update({SCALE: w[SCALE][1:]})), f"{SCALE} has shape [4, 3]"),
    (edit_weights(lambda w: w.update({SCALE: w[SCALE].int()})), f"{SCALE} has dtype I32"),
    (edit_weights(lambda w: w.update({UP: w[UP][None]})), "is no matrix"),
    (edit_weights(lambda w: w.update({UP: w[UP][:16]})), f"{SCALE} has shape"),
    (
        edit_weights(lambda w: w.update({UP: w[UP].view(torch.float8_e5m2)})),
        f"{UP} has dtype F8_E5M2, but scales",
    ),
]
MXFP4_DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (edit_weights(lambda w: w.pop(f"{EXPERTS}_scales")), f"{EXPERTS}_blocks lacks its scales"),
    (edit_weights(lambda w: w.pop(f"{EXPERTS}_blocks")), "_blocks, which is missing"),
    (
        edit_weights(lambda w: w.update({f"{EXPERTS}_scales": w[f"{EXPERTS}_scales"][:, 1:]})),
        f"{EXPERTS}_scales has shape [4, 63, 3], but {EXPERTS}_blocks implies [4, 64, 3]",
    ),
    (
        edit_weights(lambda w: w.update({f"{EXPERTS}_scales": w[f"{EXPERTS}_scales"].short()})),
        f"{EXPERTS}_scales has dtype I16",
    ),
    (
        edit_weights(lambda w: w.update({f"{EXPERTS}_blocks": w[f"{EXPERTS}_blocks"][..., :8]})),
        "must be U8 [experts, rows, blocks, 16]",
    ),
    (
        edit_weights(lambda w: w.update({EXPERTS: torch.zeros(4, 96, 64)})),
        f"holds {EXPERTS} plain and packed",
    ),
    (lambda hf: edit_config(hf, quantization_config=None), "is missing tensor"),
    (lambda hf: edit_config(hf, hidden_size=32), "but config.json implies"),
]


@pytest.mark.parametrize(
    ("family", "damage", "message"),
    [
        *[("qwen3", *case) for case in FP8_DAMAGE],
        *[("gpt_oss", *case) for case in MXFP4_DAMAGE],
    ],
)
def test_what_cannot_be_unpacked_is_one_line(
    whole: Path,
    family: str,
    damage: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    capsys: Any,
) -> None:
    assert_refused(whole / family, damage, message, tmp_path, capsys)
