"""``convert_to_hf.py --verify``: exported files against the checkpoint's draft in Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.trained_draft import TrainedDraft
from tests.helpers.trained_mla import DEEPSEEK_YARN, MLA_SIZES

BASE = {
    "make_vocab_size_divisible_by": 4,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "rotary_percent": 1.0,
    "position_embedding_type": "rope",
}
MLA = {"mla": MLA_SIZES, "rope": {"rope_theta": 500.0, "rope_scaling": DEEPSEEK_YARN}}
DRAFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "one layer": ("hf", {}),
    "two layers": ("hf", {"layers": 2}),
    "whole vocabulary": ("hf", {"draft_vocab": 53, "padded_vocab": 56}),
    "norm before residual": ("vllm", {"norm_before_residual": True}),
    "norm before fc": ("vllm", {"norm_before_fc": True}),
    "eagle3.1": ("vllm", {"algorithm": "eagle3.1"}),
    "eagle1": (
        "sglang",
        {"algorithm": "eagle1", "aux_layers": (), "draft_vocab": 53, "padded_vocab": 56},
    ),
    "speculators": ("speculators", {}),
    "mla": ("hf", MLA),
    "qk norm": ("vllm", {"qk_layernorm": True}),
    "p-eagle": ("vllm", {"algorithm": "p-eagle", "mask_token": 4, "layers": 2}),
}


def _verify(rank: int, world: int, checkpoint: Path, exported: Path) -> float | str:
    groups = megatron_parallel()
    from megatron_eagle.decode.load import read_draft
    from megatron_eagle.decode.verify import check_export

    try:
        return check_export(read_draft(checkpoint, "--load"), checkpoint, exported, groups)
    except ValueError as error:
        return str(error)


def exported(folder: Path, layout: str, dtype: torch.dtype | None, **changes: Any) -> list[Path]:
    from megatron_eagle.hf.draft.export import export_draft
    from megatron_eagle.hf.draft.formats import FORMATS

    TrainedDraft.make(**changes, base=BASE).save(folder / "draft")
    export_draft(folder / "draft", folder / "hf", dtype=dtype, fmt=FORMATS[layout])
    return [folder / "draft", folder / "hf"]


@pytest.mark.parametrize("name", DRAFTS)
def test_an_export_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    layout, changes = DRAFTS[name]
    (difference,) = run_distributed(_verify, 1, *exported(tmp_path, layout, None, **changes))
    assert isinstance(difference, float), difference


def test_rounding_to_bf16_is_no_difference(tmp_path: Path) -> None:
    (difference,) = run_distributed(_verify, 1, *exported(tmp_path, "hf", torch.bfloat16))
    assert isinstance(difference, float) and difference < 1e-4, difference


def test_a_wrong_mask_hidden_is_seen(tmp_path: Path) -> None:
    changes = {"algorithm": "p-eagle", "mask_token": 4}
    checkpoint, files = exported(tmp_path, "vllm", None, **changes)
    tensors = load_file(files / "model.safetensors")
    tensors["mask_hidden"] = tensors["mask_hidden"].roll(1, 1)
    save_file(tensors, files / "model.safetensors")
    (refusal,) = run_distributed(_verify, 1, checkpoint, files)
    assert isinstance(refusal, str) and refusal.startswith("verify: the exported files give")


@pytest.mark.parametrize("tensor", ["self_attn.k_proj.weight", "hidden_norm.weight"])
def test_one_wrong_tensor_is_seen(tensor: str, tmp_path: Path) -> None:
    checkpoint, files = exported(tmp_path, "hf", None)
    tensors = load_file(files / "model.safetensors")
    tensors[f"midlayer.{tensor}"] = tensors[f"midlayer.{tensor}"].roll(1, 0)
    save_file(tensors, files / "model.safetensors")
    (refusal,) = run_distributed(_verify, 1, checkpoint, files)
    assert isinstance(refusal, str) and refusal.startswith("verify: the exported files give")
