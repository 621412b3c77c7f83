"""What vLLM's draft model files import: which of it comes out of the wheel, and what stands in."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.readers import stand_in_blocks, stand_in_mla
from tests.readers import stand_in_layers as layers
from tests.readers.wheel_modules import WheelModules

TARGET_LAYERS = 8
MODELS = "vllm.model_executor.models"
CONFIGS = "vllm.transformers_utils.configs.speculators"
LAYERS = "vllm.model_executor.layers"
SPECULATIVE = "vllm.v1.worker.gpu.spec_decode"
REAL = [
    *(f"{MODELS}.{name}" for name in ("llama", "llama_eagle", "llama_eagle3", "utils")),
    *(f"{MODELS}.{name}" for name in ("deepseek_v2", "deepseek_eagle3")),
    *(f"{MODELS}.{name}" for name in ("qwen2", "qwen3", "qwen3_eagle3")),
    *(f"{MODELS}.{name}" for name in ("qwen3_dflash", "qwen3_dspark")),
    f"{SPECULATIVE}.eagle.eagle3_utils",
    f"{LAYERS}.mla",
    *(f"{CONFIGS}.{name}" for name in ("algos", "base")),
]
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


def draft_file(name: str, directory: str, revision: None) -> bytes | None:
    """Return a file of the draft's directory, or None if it has no such file."""
    path = Path(directory) / name
    return path.read_bytes() if path.exists() else None


STAND_INS: dict[str, dict[str, Any]] = {
    "vllm": {
        "_custom_ops": SimpleNamespace(
            rms_norm=stand_in_blocks.rms_norm, rotary_embedding=stand_in_blocks.rotary_embedding
        )
    },
    "vllm.platforms": {
        "current_platform": SimpleNamespace(is_rocm=lambda: False, is_cuda=lambda: False)
    },
    "vllm.transformers_utils.repo_utils": {"get_hf_file_bytes": draft_file},
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
        "Attention": stand_in_blocks.attention,
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
        "UnquantizedLinearMethod": layers.Unquantized,
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
    """Answer imports of vLLM; a second call does nothing."""
    if importlib.util.find_spec("vllm") is not None:
        return
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    WheelModules(wheels / "vllm", "vllm", REAL, STAND_INS).install()


def use_config(config: Any, vocab_size: int, **fields: Any) -> VllmConfig:
    """Make vLLM's configuration of a draft beside a base of ``vocab_size``, and the current one.

    ``fields`` are of the draft's model configuration.
    """
    current["config"] = VllmConfig(
        model_config=SimpleNamespace(
            get_total_num_hidden_layers=lambda: TARGET_LAYERS,
            get_num_layers=lambda parallel: TARGET_LAYERS,
            get_vocab_size=lambda: vocab_size,
            dtype=torch.float32,
            hf_config=None,
        ),
        speculative_config=SimpleNamespace(
            draft_model_config=SimpleNamespace(hf_config=config, **fields), parallel_drafting=False
        ),
        cache_config=None,
        load_config=None,
        parallel_config=SimpleNamespace(dcp_q_replicate=False),
    )
    return current["config"]
