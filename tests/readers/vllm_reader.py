"""vLLM's draft model files, out of its wheel, on stand-in layers."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV3Config, LlamaConfig, Qwen3Config

from tests.readers import stand_in_layers as layers
from tests.readers.vllm_stand_ins import CONFIGS, MODELS, use_config

LLAMA, MLA = "LlamaForCausalLMEagle3", "Eagle3DeepseekV2ForCausalLM"
QWEN3 = "Eagle3Qwen3ForCausalLM"
CLASSES = {
    LLAMA: ("llama_eagle3", "Eagle3LlamaForCausalLM"),
    MLA: ("deepseek_eagle3", MLA),
    QWEN3: ("qwen3_eagle3", QWEN3),
    "EagleLlamaForCausalLM": ("llama_eagle", "EagleLlamaForCausalLM"),
}


class VllmReader:
    """``logits`` over the base's vocabulary, -inf for what the draft cannot say."""

    def __init__(self, directory: Path, embedding: Tensor, base_head: Tensor) -> None:
        config = draft_config(directory)
        vllm_config = use_config(config, embedding.shape[0])
        self.eagle1 = config.architectures == ["EagleLlamaForCausalLM"]
        file, name = CLASSES.get(config.architectures[0], CLASSES[LLAMA])
        module = importlib.import_module(f"{MODELS}.{file}")
        self.model = getattr(module, name)(vllm_config=vllm_config)
        self.model.load_weights(load_file(directory / "model.safetensors").items())
        assert self.eagle1 or self.model.has_own_lm_head
        self.model.model.embed_tokens.weight.data = embedding  # the proposer shares the target's
        if self.eagle1:
            self.model.lm_head = layers.Rows(*base_head.shape)
            self.model.lm_head.weight.data = base_head
        unused = [f"model.layers.{i}.hidden_norm" for i in range(1, config.num_hidden_layers)]
        left = [
            name
            for name, p in self.model.named_parameters()
            if p.isnan().any() and not name.startswith(tuple(unused))
        ]
        assert not left, f"vLLM left {left} unloaded"

    def start(self, aux: Tensor) -> Tensor:
        return aux if self.eagle1 else self.model.combine_hidden_states(aux)

    def step(self, tokens: Tensor, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        output, fed_back = self.model(tokens, positions, hidden)
        if self.eagle1:
            return output @ self.model.lm_head.weight.t(), fed_back
        return self.model.compute_logits(output), fed_back


def draft_config(directory: Path) -> Any:
    """As vLLM reads it: transformers' class for a Llama, that of DeepSeek-V3 for type kimi_k2, its
    own for a speculators file."""
    content = json.loads((directory / "config.json").read_text())
    if content.get("model_type") == "kimi_k2":
        return DeepseekV3Config.from_pretrained(directory)
    if content.get("model_type") == "qwen3":
        return Qwen3Config.from_pretrained(directory)
    if "speculators_model_type" not in content:
        return LlamaConfig.from_pretrained(directory)
    reader = importlib.import_module(f"{CONFIGS}.base").SpeculatorsConfig
    proposal = reader.extract_vllm_speculative_config(content)
    assert proposal == {"method": "eagle3", "num_speculative_tokens": 4}
    fields = reader.extract_transformers_pre_trained_config(content)
    return (Qwen3Config if fields["model_type"] == "qwen3" else LlamaConfig)(**fields)
