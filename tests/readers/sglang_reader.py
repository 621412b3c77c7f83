"""SGLang's draft model file, out of its wheel, on stand-in layers."""

from __future__ import annotations

import importlib
import importlib.util
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV3Config, LlamaConfig

from tests.readers import sglang_block_reader as blocks
from tests.readers import stand_in_layers as layers
from tests.readers import stand_in_mla
from tests.readers.wheel_modules import WheelModules

MODELS = "sglang.srt.models"
LAYERS = "sglang.srt.layers"


class DualGemm:
    def __init__(self, *args: Any) -> None:
        pass

    def can_run(self, *args: Any) -> bool:
        return False


LLAMA, MLA = "LlamaForCausalLMEagle3", "Eagle3DeepseekV2ForCausalLM"
FILES = {LLAMA: "llama_eagle3", MLA: "kimi_k25_eagle3"}


class Gatherer:
    """Of fc's output over tensor-parallel ranks, of which there is one."""

    def __init__(self, **options: Any) -> None:
        pass

    def __call__(self, x: Tensor) -> Tensor:
        return x


COMMUNICATORS = "sglang.srt.distributed.device_communicators"
GATHERING = {"MultimemAllGatherer": Gatherer, "recommended_max_tokens": lambda **options: 512}
STAND_INS: dict[str, dict[str, Any]] = {
    f"{LAYERS}.activation": {"SiluAndMul": layers.SiluAndMul},
    f"{LAYERS}.dual_gemm": {"DualGemm": DualGemm},
    f"{LAYERS}.layer_boundary": {
        "layer_stack": nullcontext,
        "get_attn_tp_context": lambda: SimpleNamespace(set_attn_inputs=lambda inputs: None),
    },
    f"{LAYERS}.layernorm": {"RMSNorm": layers.RMSNorm},
    f"{LAYERS}.linear": {
        "QKVParallelLinear": layers.QKVParallelLinear,
        "MergedColumnParallelLinear": layers.MergedColumnParallelLinear,
        "ColumnParallelLinear": layers.Linear,
        "ReplicatedLinear": layers.Linear,
        "RowParallelLinear": layers.Linear,
        "LinearParallelGroup": str,
    },
    f"{LAYERS}.radix_attention": {"RadixAttention": layers.Attention},
    f"{LAYERS}.rotary_embedding": {"get_rope": layers.get_rope},
    f"{LAYERS}.vocab_parallel_embedding": {
        "ParallelLMHead": layers.Rows,
        "VocabParallelEmbedding": layers.Rows,
        "get_embedding_tp_kwargs": dict,
    },
    f"{MODELS}.deepseek_v2": {
        "DeepseekV2AttentionMLA": stand_in_mla.DeepseekV2AttentionMLA,
        "DeepseekV2MLP": stand_in_mla.DeepseekV2MLP,
    },
    # One file imports the module from its package, the other names from the module.
    COMMUNICATORS: {"triton_symm_mem_ag": SimpleNamespace(**GATHERING)},
    f"{COMMUNICATORS}.triton_symm_mem_ag": GATHERING,
    "sglang.srt.configs.draft_parallel": {
        "DraftParallelSpec": lambda **fields: fields,
    },
    "sglang.srt.model_loader.weight_utils": {"default_weight_loader": layers.load_whole},
    "sglang.srt.runtime_context": {
        "get_parallel": lambda: SimpleNamespace(tp_size=1, pp_group=None),
        "get_spec": lambda: SimpleNamespace(speculative_draft_window_size=None),
    },
    "sglang.srt.utils": {
        "add_prefix": lambda name, prefix: f"{prefix}.{name}" if prefix else name,
        "is_npu": lambda: False,
        "is_xpu": lambda: False,
        "is_gfx95_supported": lambda: False,
    },
}


def install(wheels: Path) -> None:
    """Answer imports of SGLang; a second call does nothing."""
    if importlib.util.find_spec("sglang") is not None:
        return
    blocks.install_msgspec()
    real = [*(f"{MODELS}.{name}" for name in ("llama", *FILES.values())), *blocks.REAL]
    WheelModules(wheels / "sglang", "sglang", real, {**STAND_INS, **blocks.MORE}).install()


class SglangReader:
    """``logits`` over the base's vocabulary, -inf for what the draft cannot say."""

    def __init__(self, directory: Path, embedding: Tensor, base_head: Tensor) -> None:
        content = json.loads((directory / "config.json").read_text())
        mla = content["model_type"] == "kimi_k2"
        config = (DeepseekV3Config if mla else LlamaConfig).from_pretrained(directory)
        (name,) = config.architectures
        module = importlib.import_module(f"{MODELS}.{FILES[name]}")
        self.model = getattr(module, name)(config)
        for parameter in self.model.model.fc.parameters():
            parameter.data.fill_(float("nan"))
        self.model.load_weights(load_file(directory / "model.safetensors").items())
        self.model.model.embed_tokens.weight.data = embedding  # the worker shares the target's
        unused = [f"layers.{i}.input_layernorm" for i in range(1, config.num_hidden_layers)]
        left = [
            name
            for name, p in self.model.named_parameters()
            if p.isnan().any() and not name.removeprefix("model.").startswith(tuple(unused))
        ]
        assert not left, f"SGLang left {left} unloaded"
        ids = self.model.hot_token_id
        self.ids = torch.arange(embedding.shape[0]) if ids is None else ids
        self.vocab_size = embedding.shape[0]

    def start(self, aux: Tensor) -> Tensor:
        return aux  # the model applies fc by the width of what it is given

    def step(self, tokens: Tensor, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        decode = SimpleNamespace(
            is_extend=lambda: False, is_decode=lambda: False, is_draft_extend_v2=lambda: False
        )
        batch = SimpleNamespace(
            spec_info=SimpleNamespace(hidden_states=hidden),
            mm_input_embeds=None,
            forward_mode=decode,
            contains_mm_inputs=lambda: False,
        )
        output, (fed_back,) = self.model.model(tokens, positions, batch)
        logits = torch.full((len(tokens), self.vocab_size), float("-inf"))
        logits[:, self.ids] = output @ self.model.lm_head.weight.t()
        return logits, fed_back
