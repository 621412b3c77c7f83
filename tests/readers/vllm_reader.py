"""vLLM's draft model files, out of its wheel, on stand-in layers."""

from __future__ import annotations

import importlib
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV3Config, LlamaConfig, Qwen3Config

from tests.readers import stand_in_layers as layers
from tests.readers import stand_in_mla
from tests.readers.wheel_modules import WheelModules

TARGET_LAYERS = 8
MODELS = "vllm.model_executor.models"
CONFIGS = "vllm.transformers_utils.configs.speculators"
LAYERS = "vllm.model_executor.layers"
REAL = [
    *(f"{MODELS}.{name}" for name in ("llama", "llama_eagle", "llama_eagle3", "utils")),
    *(f"{MODELS}.{name}" for name in ("deepseek_v2", "deepseek_eagle3")),
    *(f"{MODELS}.{name}" for name in ("qwen2", "qwen3", "qwen3_eagle3")),
    f"{LAYERS}.mla",
    *(f"{CONFIGS}.{name}" for name in ("algos", "base")),
]
LLAMA, MLA = "LlamaForCausalLMEagle3", "Eagle3DeepseekV2ForCausalLM"
QWEN3 = "Eagle3Qwen3ForCausalLM"
CLASSES = {
    LLAMA: ("llama_eagle3", "Eagle3LlamaForCausalLM"),
    MLA: ("deepseek_eagle3", MLA),
    QWEN3: ("qwen3_eagle3", QWEN3),
    "EagleLlamaForCausalLM": ("llama_eagle", "EagleLlamaForCausalLM"),
}
current: dict[str, Any] = {}


class VllmConfig(SimpleNamespace):
    @staticmethod
    def get_quantization_config(*args: Any) -> None:
        return None


class LogitsProcessor(torch.nn.Module):
    def __init__(self, size: int, scale: float = 1.0, **rest: Any) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, head: Any, hidden: Tensor) -> Tensor:
        return hidden @ head.weight.t() * self.scale


def support_torch_compile(target: Any = None, **options: Any) -> Any:
    return target if isinstance(target, type) else lambda decorated: decorated


class PluggableLayer(torch.nn.Module):
    @staticmethod
    def register(name: str) -> Any:
        return lambda layer: layer


def get_rope(head_size: int, **fields: Any) -> Any:
    mla = fields.get("is_neox_style") is False
    return (stand_in_mla if mla else layers).get_rope(head_size, **fields)


STAND_INS: dict[str, dict[str, Any]] = {
    "vllm.compilation.decorators": {"support_torch_compile": support_torch_compile},
    "vllm.config": {
        "VllmConfig": VllmConfig,
        "get_current_vllm_config": lambda: current["config"],
    },
    "vllm.distributed": {
        "get_tensor_model_parallel_world_size": lambda: 1,
        "get_tensor_model_parallel_rank": lambda: 0,
    },
    "vllm.logger": {"init_logger": logging.getLogger},
    f"{LAYERS}.activation": {"SiluAndMul": layers.SiluAndMul},
    f"{LAYERS}.attention": {
        "Attention": layers.Attention,
        "MLAAttention": stand_in_mla.MLAAttention,
    },
    f"{LAYERS}.attention.encoder_only_attention": {"Attention": layers.Attention},
    "vllm.v1.attention.backend": {
        "AttentionType": SimpleNamespace(DECODER="decoder", ENCODER_ONLY="encoder_only")
    },
    "vllm.transformers_utils.config": {
        "set_default_rope_theta": lambda config, default_theta: None
    },
    "vllm.envs": {"is_set": lambda name: False},
    "vllm.model_executor.custom_op": {"PluggableLayer": PluggableLayer},
    f"{LAYERS}.fusion.fused_act_quant": {
        "maybe_fused_act_quant": lambda activation, x, linear: activation(x)
    },
    f"{LAYERS}.layernorm": {"RMSNorm": layers.RMSNorm},
    f"{LAYERS}.linear": {
        "QKVParallelLinear": layers.QKVParallelLinear,
        "MergedColumnParallelLinear": layers.MergedColumnParallelLinear,
        "ColumnParallelLinear": layers.Linear,
        "ReplicatedLinear": layers.Linear,
        "RowParallelLinear": layers.Linear,
    },
    f"{LAYERS}.logits_processor": {"LogitsProcessor": LogitsProcessor},
    f"{LAYERS}.rotary_embedding": {"get_rope": get_rope},
    f"{LAYERS}.vocab_parallel_embedding": {
        "ParallelLMHead": layers.Rows,
        "VocabParallelEmbedding": layers.Rows,
    },
    "vllm.model_executor.model_loader.reload": {
        "support_quantized_model_reload_from_hp_weights": lambda function: function
    },
    "vllm.model_executor.model_loader.weight_utils": {"default_weight_loader": layers.load_whole},
    f"{MODELS}.interfaces": {"supports_any_eagle": lambda model: True},
    "vllm.transformers_utils.utils": {"without_trust_remote_code": lambda kwargs: kwargs},
}


def install(wheels: Path) -> None:
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    WheelModules(wheels / "vllm", "vllm", REAL, STAND_INS).install()


class VllmReader:
    """``logits`` over the base's vocabulary, -inf for what the draft cannot say."""

    def __init__(self, directory: Path, embedding: Tensor, base_head: Tensor) -> None:
        config = draft_config(directory)
        current["config"] = VllmConfig(
            model_config=SimpleNamespace(
                get_total_num_hidden_layers=lambda: TARGET_LAYERS,
                get_num_layers=lambda parallel: TARGET_LAYERS,
                get_vocab_size=lambda: embedding.shape[0],
                dtype=torch.float32,
                hf_config=None,
            ),
            speculative_config=SimpleNamespace(
                draft_model_config=SimpleNamespace(hf_config=config), parallel_drafting=False
            ),
            cache_config=None,
            load_config=None,
            parallel_config=SimpleNamespace(dcp_q_replicate=False),
        )
        self.eagle1 = config.architectures == ["EagleLlamaForCausalLM"]
        file, name = CLASSES.get(config.architectures[0], CLASSES[LLAMA])
        module = importlib.import_module(f"{MODELS}.{file}")
        self.model = getattr(module, name)(vllm_config=current["config"])
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
