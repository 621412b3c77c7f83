"""An imported base computes the Hugging Face model's logits in every layout."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_eagle.checkpoint.directory import load_base_json, resolve_checkpoint
from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.quantize import fp8_directory, mxfp4_directory
from tests.helpers.tiny_hf import SIZES, logits_of, make_base

RELATIVE = 1e-4
LENGTH, BATCH = 16, 2
LAYOUTS = [{}, {"tp": 2}, {"pp": 2}]
DENSE = ("llama", "mistral", "qwen2", "qwen3")
MOE = ("mixtral", "qwen3_moe", "glm4_moe", "gpt_oss", "deepseek_v2", "deepseek_v3")
CASES = [
    *[(family, layout) for family in DENSE + MOE for layout in LAYOUTS],
    *[(family, {"ep": 2}) for family in MOE],
    ("llama", {"tp": 4}),
    ("qwen2", {"tp": 2, "pp": 2}),
    ("qwen3_moe", {"tp": 2, "ep": 2}),
    # test_hybrid_bases.py has it at TP 1 and 2.
    pytest.param("qwen3_next", {"pp": 2}, marks=pytest.mark.slow),
    pytest.param("qwen3_next", {"ep": 2}, marks=pytest.mark.slow),
]

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.5},
    **{"high_freq_factor": 3.0, "original_max_position_embeddings": 32},
}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0},
    "original_max_position_embeddings": 16,
}


def _name(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key}{size}" for key, size in value.items()) or "one"
    return str(value)


@pytest.mark.parametrize(("family", "layout"), CASES, ids=_name)
def test_logits_equal_hugging_face(family: str, layout: dict[str, int], tmp_path: Path) -> None:
    check_logits(tmp_path, family, layout)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": []}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("llama", {"rope_parameters": LINEAR}),
        ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy"}),
        ("deepseek_v2", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}),
        ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}}),
        ("deepseek_v3", {"q_lora_rank": None, "rope_parameters": YARN}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("qwen2", {"rope_parameters": YARN}),
    ],
)
def test_variants_equal_hugging_face(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    check_logits(tmp_path, family, {"tp": 2}, **fields)


@pytest.mark.parametrize(
    ("family", "layout"), [("deepseek_v3", {"tp": 2}), ("gpt_oss", {"ep": 2})], ids=_name
)
def test_bases_that_ship_quantized_equal_hugging_face(
    family: str, layout: dict[str, int], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96} if family == "gpt_oss" else {}
    check_logits(tmp_path, family, layout, quantize=True, **sizes)


def check_logits(
    folder: Path, family: str, layout: dict[str, int], quantize: bool = False, **fields: Any
) -> None:
    """Import a tiny base and compare its logits on the layout's ranks with transformers'."""
    model = make_base(folder / "hf", family, **fields)
    if quantize:
        model = _quantized(folder, family)
    import_base(folder / "hf", folder / "base")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH), generator=generator)
    expected = logits_of(model, tokens)
    tp = layout.get("tp", 1)
    padded = run_distributed(
        _logits, math.prod(layout.values()), layout, str(folder / "base"), tokens
    )[-1]
    found = padded[..., : SIZES["vocab_size"]]
    assert padded.shape[-1] == 128 * tp
    assert not padded[..., SIZES["vocab_size"] :].any(), "rows of padding are zero"
    assert (found - expected).abs().max() < RELATIVE * expected.abs().max()


def _quantized(folder: Path, family: str) -> Any:
    """Quantize the weights in ``folder``/hf; returns transformers' model of what they now mean."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(folder / "hf", folder / "plain")
    meant = mxfp4_directory(folder / "hf") if family == "gpt_oss" else fp8_directory(folder / "hf")
    save_file(meant, folder / "plain" / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(
        folder / "plain", dtype=torch.float32, attn_implementation="eager"
    ).eval()


def _logits(
    rank: int, world_size: int, layout: dict[str, int], directory: str, tokens: Tensor
) -> Any:
    """Logits [B, S, V] over all TP ranks, on the last pipeline stage."""
    etp = load_base_json(directory).megatron_args.get("expert_tensor_parallel_size")
    groups = megatron_parallel(**layout, etp=etp)
    tp, pp = layout.get("tp", 1), layout.get("pp", 1)
    first, last = groups.pp.rank() == 0, groups.pp.rank() == pp - 1
    model = _gpt(directory, layout, groups, first, last)
    _load(model, directory)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    if not first:
        hidden = torch.empty(LENGTH, BATCH, SIZES["hidden_size"])
        torch.distributed.recv(hidden, rank - tp)
        model.set_input_tensor(hidden)
    with torch.no_grad():
        output = model(tokens, positions, None)
    if not last:
        torch.distributed.send(output, rank + tp)
        return None
    shards = [torch.empty_like(output) for _ in range(tp)]
    torch.distributed.all_gather(shards, output.contiguous(), group=groups.tp)
    return torch.cat(shards, dim=-1)


def _gpt(directory: str, layout: dict[str, int], groups: Any, first: bool, last: bool) -> Any:
    from megatron_eagle.layers.backend import local_backend
    from megatron_eagle.teacher.build import base_config, build_base

    info = load_base_json(directory)
    config = base_config(
        info,
        layout.get("tp", 1),
        pipeline_model_parallel_size=layout.get("pp", 1),
        expert_model_parallel_size=layout.get("ep", 1),
        pipeline_dtype=torch.float32,
    )
    return build_base(config, info, local_backend(), groups, first, last).eval()


def _load(model: Any, directory: str) -> None:
    """Fill `model`; every one of its tensors must be in the checkpoint, and no other may be."""
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(
        {"model": model.sharded_state_dict()},
        str(resolve_checkpoint(directory)),
        strict=dist_checkpointing.validation.StrictHandling.RAISE_ALL,
    )
    model.load_state_dict(state["model"])
