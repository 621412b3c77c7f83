"""Quantizing a tiny model's directory by plain code, and the floats that it then stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP8_MAX = 448.0
BLOCK = (16, 20)
"""Divides few sides of the tiny weights, as 128 does not divide DeepSeek's 576 rows."""
MX_KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def fp8_blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [rows, columns] -> float8 weight, fp32 scale per block, and what they stand for."""
    (rows, columns), (high, wide) = weight.shape, block
    packed = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // high), -(-columns // wide))
    meant = torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
            scales[i, j] = weight[place].abs().max() / FP8_MAX
            packed[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[place] = packed[place].float() * scales[i, j]
    return packed, scales, meant


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [E, in, out] -> blocks uint8 [E, out, in / 32, 16], exponents uint8 [E, out, in / 32],
    and what they stand for."""
    grouped = weight.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (grouped.abs().amax(-1) / FP4[-1]).log2().ceil()
    scaled = grouped / exponents.exp2().unsqueeze(-1)
    nearest = (scaled.abs().unsqueeze(-1) - FP4).abs().argmin(-1)
    meant = FP4[nearest] * scaled.sign() * exponents.exp2().unsqueeze(-1)
    nibbles = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    blocks = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return blocks, (exponents + 127).to(torch.uint8), meant.flatten(-2).transpose(1, 2)


def fp8_directory(directory: Path) -> dict[str, Tensor]:
    """Quantize every linear weight of the layers as DeepSeek-V3 ships them; returns what the whole
    directory then stands for."""

    def pack(name: str, weight: Tensor, packed: dict[str, Tensor]) -> Tensor:
        if not name.endswith("proj.weight") and "kv_a_proj_with_mqa" not in name:
            packed[name] = weight
            return weight
        packed[name], packed[f"{name}_scale_inv"], meant = fp8_blocks(weight, BLOCK)
        return meant

    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
    }
    return _rewrite(directory, pack, quantization)


def mxfp4_directory(directory: Path) -> dict[str, Tensor]:
    """Quantize the experts as gpt-oss ships them; returns what the directory then stands for."""

    def pack(name: str, weight: Tensor, packed: dict[str, Tensor]) -> Tensor:
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = weight
            return weight
        packed[f"{name}_blocks"], packed[f"{name}_scales"], meant = mxfp4(weight)
        return meant

    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": MX_KEPT}
    return _rewrite(directory, pack, quantization)


def _rewrite(
    directory: Path,
    pack: Callable[[str, Tensor, dict[str, Tensor]], Tensor],
    quantization: dict[str, Any],
) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    file, config = directory / "model.safetensors", directory / "config.json"
    meant = {
        name: pack(name, weight, packed).contiguous() for name, weight in load_file(file).items()
    }
    save_file({name: tensor.contiguous() for name, tensor in packed.items()}, file)
    content = {**json.loads(config.read_text()), "quantization_config": quantization}
    config.write_text(json.dumps(content))
    return meant
