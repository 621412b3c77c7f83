"""Layers with gated delta nets and gated attention: every layer's output, and half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import load_base_json
from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.tiny_hf import SIZES, make_base, wrap_text

TOLERANCES = {"qwen3_next": 2e-5, "qwen3_5": 5e-5}
"""Of the largest value, by family: transformers' own fp32 of these Qwen3.5s is off by 2e-5."""
LENGTH, BATCH, LAYERS = 70, 2, 4
"""More positions than a chunk of the delta rule has."""
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "partial_rotary_factor": 0.5}
MROPE = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 1, 1]}
VARIANTS: dict[str, dict[str, Any]] = {
    "experts-everywhere-tied": {
        "mlp_only_layers": [],
        "full_attention_interval": 4,
        "tie_word_embeddings": True,
    },
    "some-dense-and-yarn": {
        "norm_topk_prob": False,
        "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
        "rope_parameters": {**YARN, "original_max_position_embeddings": 16},
    },
    "qwen3.5": {"family": "qwen3_5"},
    "qwen3.5-in-a-multimodal-model": {
        "family": "qwen3_5",
        "tie_word_embeddings": True,
        "rope_parameters": {**MROPE, "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    },
}


@pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, True)])
def test_every_layer_s_output_is_hugging_face_s(tp: int, sp: bool, tmp_path: Path) -> None:
    """The captured layers count as transformers counts them; the last is the final hidden."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH), generator=generator)
    expected = {}
    for name, fields in VARIANTS.items():
        folder = tmp_path / name
        fields = {"family": "qwen3_next", "max_position_embeddings": 128, **fields}
        model = make_base(folder / "hf", **fields)
        if "multimodal" in name:
            wrap_text(folder / "hf")
        import_base(folder / "hf", folder / "base")
        with torch.no_grad():
            states = model(tokens, output_hidden_states=True).hidden_states
        expected[name] = [states[i].transpose(0, 1) for i in (1, 2, 3, 4)]
    folders = {name: str(tmp_path / name / "base") for name in VARIANTS}
    for found in run_distributed(layer_outputs, tp, folders, tokens, sp):
        for name, states in expected.items():
            family = VARIANTS[name].get("family", "qwen3_next")
            for layer, (ours, theirs) in enumerate(zip(found[name], states, strict=True)):
                worst = (ours - theirs).abs().max() / theirs.abs().max()
                assert worst < TOLERANCES[family], f"{name}, layer {layer}: {worst:.1e}"


def layer_outputs(
    rank: int, world: int, folders: dict[str, str], tokens: Tensor, sp: bool
) -> dict[str, list[Tensor]]:
    """The outputs [S, B, H] of all layers but the last, and the final hidden, by base."""
    groups = megatron_parallel(tp=world)
    from megatron_eagle.compat import gather_from_sequence_parallel_region
    from megatron_eagle.layers.backend import local_backend
    from megatron_eagle.teacher.base import FrozenBase
    from megatron_eagle.teacher.build import base_config, build_base, load_base

    found = {}
    for name, folder in folders.items():
        info = load_base_json(folder)
        config = base_config(info, world, sequence_parallel=sp)
        gpt = build_base(config, info, local_backend(), groups)
        load_base(gpt, folder)
        outputs = FrozenBase(gpt, range(LAYERS - 1), info.vocab_size)(tokens)
        states = [*outputs.features.chunk(LAYERS - 1, dim=-1), outputs.final_hidden]
        if sp:
            states = [gather_from_sequence_parallel_region(x, group=groups.tp) for x in states]
        found[name] = [x.contiguous() for x in states]
    return found
