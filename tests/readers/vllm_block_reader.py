"""vLLM's block draft model files, out of its wheel, on stand-in layers."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config

from tests.helpers.block_files import AUX_LAYERS
from tests.readers import stand_in_layers as layers
from tests.readers.block_drafts import BlockSample
from tests.readers.vllm_stand_ins import CONFIGS, MODELS, SPECULATIVE, use_config

CLASSES = {
    "DFlashDraftModel": ("qwen3_dflash", "DFlashQwen3ForCausalLM"),
    "Qwen3DSparkModel": ("qwen3_dspark", "Qwen3DSparkForCausalLM"),
}
"""As in vLLM's registry."""


class VllmBlockReader:
    """The draft that vLLM loads from ``given``'s directory, and the cache of one request."""

    def __init__(self, given: BlockSample) -> None:
        case = given.case
        config = block_config(given.directory, case.config.drafts)
        vllm_config = use_config(
            config, case.config.vocab_size, model=str(given.directory), revision=None
        )
        utils = importlib.import_module(f"{SPECULATIVE}.eagle.eagle3_utils")
        captured = utils.get_eagle3_aux_layers_from_config(vllm_config.speculative_config)
        assert captured == tuple(i + 1 for i in AUX_LAYERS)  # vLLM counts states
        (architecture,) = config.architectures
        file, name = CLASSES[architecture]
        self.dspark = file == "qwen3_dspark"
        # Of a block's rows: vLLM's DSpark takes the anchor for one of the drafts, or for none.
        assert not self.dspark or config.sample_from_anchor
        self.model: Any = getattr(importlib.import_module(f"{MODELS}.{file}"), name)(
            vllm_config=vllm_config
        )
        self.given, self.stored = given, 0
        self.load(load_file(given.directory / "model.safetensors"))

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load as vLLM does; what the draft has none of is the base's."""
        model, case = self.model, self.given.case
        model.has_own_lm_head = False
        for name, parameter in model.named_parameters():
            if "mask_embedding" not in name:
                parameter.data.fill_(float("nan") if parameter.is_floating_point() else -1)
        model.load_weights(tensors.items())
        model.model.embed_tokens.weight.data = case.embedding
        if not model.has_own_lm_head:
            model.lm_head = layers.Rows(*case.output_weight.shape)
            model.lm_head.weight.data = case.output_weight
        left = [
            n
            for n, p in model.named_parameters()
            if (p.isnan() if p.is_floating_point() else p < 0).any()
        ]
        assert not left, f"vLLM left {left} unloaded"
        assert not model.model.has_separate_mask_embedding
        for layer, causal in zip(model.model.layers, model.get_draft_attn_causal(), strict=True):
            layer.self_attn.attn.causal = causal

    @torch.no_grad()
    def round(self, anchor: int) -> tuple[Tensor, Tensor | None]:
        """Logits [B, D] of the block at ``anchor``, teacher-forced, and its confidence [B] between
        0 and 1.

        Stores the context that the rounds before have not stored, over their blocks' rows.
        """
        given, slots = self.given, self.given.case.config.block_size
        new = torch.arange(self.stored, anchor)
        states = self.model.combine_hidden_states(given.features[new])
        self.model.precompute_and_store_context_kv(states, new, new)
        self.stored = anchor
        ids = torch.full((slots,), self.model.model.mask_token_id)
        ids[0] = given.tokens[anchor]
        positions = anchor + torch.arange(slots)
        for layer in self.model.model.layers:
            layer.self_attn.attn.positions = positions
        hidden = self.model(ids, positions)
        if not self.dspark:
            return self.model.compute_logits(hidden)[:, given.case.vocab_ids], None
        embedded = self.model.markov_embed(given.tokens[anchor : anchor + slots])
        logits = self.model.compute_draft_logits(hidden) + self.model.markov_bias(embedded)
        if self.model.model.confidence_head is None:
            return logits, None
        return logits, self.model.compute_confidence(hidden, embedded)

    def said_ids(self) -> Tensor:
        """The base's ids of the draft's tokens, in the draft's order."""
        size = self.model.config.draft_vocab_size
        if self.dspark:
            return self.model.map_draft_to_target(torch.arange(size))
        offsets = self.model.draft_id_to_target_id
        return torch.arange(size) if offsets is None else torch.arange(size) + offsets


def block_config(directory: Path, drafts: int) -> Any:
    """As vLLM reads it: transformers' class of type qwen3, its own for a speculators file."""
    content = json.loads((directory / "config.json").read_text())
    if "speculators_model_type" in content:
        reader = importlib.import_module(f"{CONFIGS}.base").SpeculatorsConfig
        method = content["speculators_model_type"]
        proposal = reader.extract_vllm_speculative_config(content)
        assert proposal == {"method": method, "num_speculative_tokens": drafts}
        content = reader.extract_transformers_pre_trained_config(content)
    assert content["model_type"] == "qwen3"
    return Qwen3Config(**content)
