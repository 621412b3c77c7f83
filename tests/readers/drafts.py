"""Exported drafts of every kind, and what the oracle computes from the same weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_eagle.hf.draft.export import export_draft
from megatron_eagle.hf.draft.formats import FORMATS
from tests.helpers.trained_draft import (
    Shape,
    TrainedDraft,
    hf_tensors,
    megatron_tensors,
    metadata_json,
)
from tests.helpers.trained_mla import DEEPSEEK_YARN, MLA_SIZES
from tests.reference.eagle3 import ReferenceConfig, ReferenceEagle3

LENGTH, STEPS = 14, 3
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FULL = {"draft_vocab": 53, "padded_vocab": 64}
DRAFTS: dict[str, dict[str, Any]] = {
    "one-layer": {},
    "two-layers": {"layers": 2},
    "whole-vocabulary": FULL,
    "llama3-rope": {"rope": {"rope_theta": 500.0, "rope_scaling": LLAMA3}},
    "linear-rope": {
        "rope": {"rope_theta": 500.0, "rope_scaling": {**LLAMA3, "rope_type": "linear"}}
    },
    "eagle3.1": {"algorithm": "eagle3.1"},
    "eagle3.1-two-layers-whole-vocabulary": {"algorithm": "eagle3.1", "layers": 2, **FULL},
    "norm-before-fc": {"norm_before_fc": True},
    "norm-before-residual": {"norm_before_residual": True},
    "qk-norm": {"qk_layernorm": True},
    "qk-norm-two-layers-eagle3.1": {"qk_layernorm": True, "layers": 2, "algorithm": "eagle3.1"},
    "two-captures": {"aux_layers": (3, 7)},
    "one-capture": {"aux_layers": (7,)},
    "mla": {"mla": MLA_SIZES},
    "mla-yarn-eagle3.1": {
        "mla": MLA_SIZES,
        "algorithm": "eagle3.1",
        "rope": {"rope_theta": 500.0, "rope_scaling": DEEPSEEK_YARN},
        **FULL,
    },
    "mla-two-layers-norm-before-residual": {
        "mla": MLA_SIZES,
        "layers": 2,
        "norm_before_residual": True,
    },
    "eagle1": {"algorithm": "eagle1", **FULL},
    "eagle1-two-layers": {"algorithm": "eagle1", "layers": 2, **FULL},
}  # every one with 6 heads of size 10 over 2 groups at hidden size 24


@dataclass(frozen=True)
class Sample:
    """tokens [LENGTH + 2 STEPS + 1]; aux [LENGTH + STEPS, A * H]; logits [LENGTH + STEPS, D]: of
    the first LENGTH positions at step 0, then of the last of them at steps 1 .. STEPS."""

    directory: Path
    embedding: Tensor
    base_head: Tensor
    vocab_ids: Tensor
    tokens: Tensor
    aux: Tensor
    logits: Tensor


def sample(folder: Path, name: str, fmt: str) -> Sample | str:
    """The draft ``name`` exported as ``fmt``, or why it is refused."""
    draft = make_draft(name)
    draft.save(folder / "ckpt")
    try:
        export_draft(folder / "ckpt", folder / fmt, fmt=FORMATS[fmt])
    except ValueError as error:
        return str(error)
    shape = draft.shape
    embedding, base_head = (torch.randn(shape.vocab, shape.hidden) for _ in range(2))
    oracle = make_oracle(draft, folder, embedding, base_head)
    length = LENGTH + STEPS
    tokens = torch.randint(shape.vocab, (length + STEPS + 1,))
    aux = torch.randn(length, oracle.config.num_aux * shape.hidden)
    return Sample(
        folder / fmt, embedding, base_head, oracle.vocab_ids, tokens, aux,
        oracle_logits(oracle, tokens, aux),
    )  # fmt: skip


def make_draft(name: str) -> TrainedDraft:
    """Weights of a trained draft's size, so that no softmax is saturated."""
    shape = Shape(**{**asdict(Shape()), **DRAFTS[name]})
    hf = {
        key: 1 + 0.2 * tensor
        if key.endswith(("norm.weight", "layernorm.weight"))
        else 0.3 * tensor
        if tensor.is_floating_point()
        else tensor
        for key, tensor in hf_tensors(shape).items()
    }
    content = metadata_json(shape)
    content["base"]["megatron_args"]["rotary_base"] = int(shape.rope["rope_theta"])
    return TrainedDraft(shape, hf, megatron_tensors(shape, hf), content)


def make_oracle(
    draft: TrainedDraft, folder: Path, embedding: Tensor, base_head: Tensor
) -> ReferenceEagle3:
    """The oracle, from the export in vLLM's format; EAGLE-1, which is not its file, by hand."""
    if not (folder / "vllm").exists():
        export_draft(folder / "ckpt", folder / "vllm", fmt=FORMATS["vllm"])
    if draft.shape.algorithm != "eagle1":
        return ReferenceEagle3.from_hf(folder / "vllm", embedding)
    shape = draft.shape
    config = ReferenceConfig(
        hidden_size=shape.hidden, target_hidden_size=shape.hidden, intermediate_size=shape.ffn,
        num_heads=shape.heads, num_kv_heads=shape.groups, head_dim=shape.head_dim,
        vocab_size=shape.vocab, draft_vocab_size=shape.vocab, num_layers=shape.layers, num_aux=1,
        rope_theta=shape.rope["rope_theta"], eagle1=True,
    )  # fmt: skip
    oracle = ReferenceEagle3(config, embedding)
    tensors = load_file(folder / "vllm" / "model.safetensors")
    if shape.layers == 1:
        tensors = {name.replace("layers.0.", "midlayer."): x for name, x in tensors.items()}
    maps = {"d2t": oracle.d2t, "t2d": oracle.t2d, "lm_head.weight": base_head}
    oracle.load_state_dict({**tensors, **maps}, strict=True)
    return oracle


@torch.no_grad()
def oracle_logits(oracle: ReferenceEagle3, tokens: Tensor, aux: Tensor) -> Tensor:
    """What a server computes for LENGTH prompt positions and STEPS more: the last prompt row of the
    query-aligned unroll attends to the prompt and to its own later steps, as a chain does."""
    past: list[list[Any]] = [[] for _ in range(oracle.config.num_layers)]
    hidden, rows = oracle.start(aux.unsqueeze(0)), []
    for step in range(STEPS + 1):
        consumed = tokens[step + 1 : step + 1 + aux.shape[0]].unsqueeze(0)
        output = oracle.step(hidden, consumed, past)
        logits = oracle.lm_head(oracle.norm(output))[0]
        rows.append(logits[:LENGTH] if step == 0 else logits[LENGTH - 1 : LENGTH])
        hidden = oracle.fed_back(output)
    return torch.cat(rows)
