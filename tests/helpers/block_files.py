"""Block drafts as other projects write them, and their way through a checkpoint to an export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_eagle.checkpoint.directory import load_base_json
from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.hf.draft.checkpoint import write_draft_checkpoint
from megatron_eagle.hf.draft.export import export_draft
from megatron_eagle.hf.draft.formats import FORMATS
from megatron_eagle.hf.draft.import_hf import open_hf_draft
from tests.helpers.block_case import CONFIG, DSPARK, BlockCase, random_weights
from tests.helpers.tiny_hf import SIZES, make_base
from tests.reference.blocks import ReferenceBlocks

AUX_LAYERS, LAYERS, VOCAB = (1, 3, 5), 7, SIZES["vocab_size"]
SMALL = {"draft_vocab_size": 23}
VARIANTS: dict[str, dict[str, Any]] = {
    "dflash": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 12},
    "dflash-compressed": {**SMALL, "num_layers": 1},
    "vanilla": DSPARK,
    "vanilla-compressed": {**DSPARK, **SMALL, "confidence": False},
    "gated": {**DSPARK, "markov": "gated"},
    "rnn": {**DSPARK, "markov": "rnn"},
}
FORMAT = {"dflash-compressed": "vllm", "vanilla-compressed": "vllm", "gated": "sglang",
          "rnn": "sglang"}  # fmt: skip
"""The format of a variant that not every server reads; the others go to "hf"."""


def make_files_base(folder: Path) -> Path:
    """Make and import a base of seven layers; returns the checkpoint."""
    make_base(folder / "hf", "llama", num_hidden_layers=LAYERS)
    import_base(folder / "hf", folder / "base")
    return folder / "base"


def make_draft(base: Path, name: str, **changes: Any) -> BlockCase:
    """Random weights of the draft ``name`` beside ``base``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.parent / "hf")
    embedding = model.get_input_embeddings().weight.detach()
    output = model.get_output_embeddings().weight.detach()
    config = dataclasses.replace(
        CONFIG,
        **{
            "hidden_size": SIZES["hidden_size"], "intermediate_size": 20, "vocab_size": VOCAB,
            "draft_vocab_size": VOCAB, "num_aux": len(AUX_LAYERS), "mask_token": 2,
            "rms_eps": SIZES["rms_norm_eps"], **VARIANTS[name], **changes,
        },
    )  # fmt: skip
    torch.manual_seed(5)
    ids = torch.randperm(VOCAB)[: config.draft_vocab_size].sort().values
    weights = random_weights(ReferenceBlocks(config, embedding, output, ids))
    none = torch.empty(0)
    return BlockCase(config, weights, ids, embedding, output, none, none, none, none)


def tensors_of(case: BlockCase) -> dict[str, Tensor]:
    """The tensors as other projects name them, which is as the oracle does."""
    tensors = {name: w.clone() for name, w in case.weights.items()}
    if case.config.draft_vocab_size < case.config.vocab_size:
        tensors["lm_head.weight"] = case.output_weight[case.vocab_ids].clone()
        tensors["d2t"] = case.vocab_ids - torch.arange(len(case.vocab_ids))
    return tensors


def config_of(case: BlockCase) -> dict[str, Any]:
    """config.json in z-lab's spelling, or for DSpark in DeepSpec's."""
    c = case.config
    config: dict[str, Any] = {
        "architectures": ["Qwen3DSparkModel" if c.next_token else "DFlashDraftModel"],
        "model_type": "qwen3", "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim, "hidden_act": "silu", "rms_norm_eps": c.rms_eps,
        "attention_bias": False, "vocab_size": c.vocab_size, "rope_theta": c.rope_theta,
        "block_size": c.block_size, "num_target_layers": LAYERS,
    }  # fmt: skip
    if c.draft_vocab_size < c.vocab_size:
        config["draft_vocab_size"] = c.draft_vocab_size
    layers = {"target_layer_ids": list(AUX_LAYERS), "mask_token_id": c.mask_token}
    if not c.next_token:
        return {**config, "dflash_config": layers}
    heads = {"markov_rank": c.rank, "markov_head_type": c.markov}
    heads |= {"enable_confidence_head": c.confidence, "confidence_head_with_markov": True}
    return {**config, **layers, **heads}


def write_files(case: BlockCase, folder: Path, **changes: Any) -> Path:
    """Write the draft as another project would; ``changes`` go to config.json."""
    folder.mkdir()
    save_file(tensors_of(case), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config_of(case), **changes}))
    return folder


def checkpoint_of(case: BlockCase, base: Path, folder: Path) -> Path:
    """Import the draft into a checkpoint below ``folder``."""
    files = write_files(case, folder / "foreign")
    stored = open_hf_draft(files, load_base_json(base), base_directory=base)
    write_draft_checkpoint(stored, folder / "draft")
    return folder / "draft"


def export(checkpoint: Path, folder: Path, fmt: str) -> Path:
    """Convert the checkpoint into ``folder``."""
    export_draft(checkpoint, folder, fmt=FORMATS[fmt])
    return folder
