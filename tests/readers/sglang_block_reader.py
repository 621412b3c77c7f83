"""SGLang's block draft model files, out of its wheel, on stand-in layers."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config

from tests.readers import stand_in_layers as layers
from tests.readers.block_drafts import BlockSample
from tests.readers.wheel_modules import WheelModules

MODELS, LAYERS = "sglang.srt.models", "sglang.srt.layers"
SPECULATIVE = "sglang.srt.speculative"
FILES = ("dflash", "dspark")
REAL = (
    *(f"{MODELS}.{name}" for name in FILES),
    f"{SPECULATIVE}.dflash_utils",
    f"{SPECULATIVE}.dspark_components.dspark_config",
)


class AttentionType:
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"


class BlockAttention(layers.Attention):
    """Over the context and the whole block."""

    def __init__(self, *, head_dim: int, scaling: float, attn_type: str, **rest: Any) -> None:
        assert attn_type == AttentionType.ENCODER_ONLY, "the slots of a block see each other"
        heads, kv_heads = rest["num_heads"], rest["num_kv_heads"]
        super().__init__(heads, head_dim, scaling, kv_heads)
        self.layer_id = rest["layer_id"]

    def set_context(self, k: Tensor, v: Tensor) -> None:
        self.keys, self.values = (
            x.view(-1, self.kv_heads, self.size).transpose(0, 1) for x in (k, v)
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *batch: Any) -> Tensor:
        def split(x: Tensor, heads: int) -> Tensor:
            return x.view(-1, heads, self.size).transpose(0, 1)

        repeat = self.heads // self.kv_heads
        keys, values = (
            torch.cat([context, split(x, self.kv_heads)], dim=1).repeat_interleave(repeat, 0)
            for context, x in ((self.keys, k), (self.values, v))
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            split(q, self.heads), keys, values, scale=self.scale
        )
        return out.transpose(0, 1).flatten(1)


class Struct:
    """Of msgspec: fields by keyword."""

    def __init_subclass__(cls, **options: Any) -> None:
        pass

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


def apply_qk_norm(
    q: Tensor, k: Tensor, q_norm: Any, k_norm: Any, head_dim: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """Norm every head."""
    normed = (norm(x.reshape(-1, head_dim)).view_as(x) for norm, x in ((q_norm, q), (k_norm, k)))
    return tuple(normed)  # type: ignore[return-value]


def rope_of(config: Any) -> tuple[float, dict[str, Any] | None]:
    """The base of the rotary frequencies, and no scaling, of a transformers configuration."""
    assert config.rope_parameters["rope_type"] == "default"
    return config.rope_parameters["rope_theta"], None


class Environment:
    """SGLang's environment variables, all unset."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(get=lambda: False)


def attention(*args: Any, **fields: Any) -> layers.Attention:
    """Attention of a block, which says its type, or of an EAGLE draft."""
    if "attn_type" in fields:
        return BlockAttention(**fields)
    return layers.Attention(*args, **fields)


MORE: dict[str, dict[str, Any]] = {
    f"{LAYERS}.logits_processor": {"LogitsProcessorOutput": Struct},
    f"{LAYERS}.radix_attention": {"RadixAttention": attention, "AttentionType": AttentionType},
    f"{MODELS}.utils": {"apply_qk_norm": apply_qk_norm},
    f"{SPECULATIVE}.ragged_verify": {
        "RaggedVerifyMode": SimpleNamespace(STATIC="static"),
        "read_ragged_verify_mode": lambda: "compact",  # builds the confidence head
    },
    "sglang.srt.environ": {"envs": Environment()},
    "sglang.srt.utils.common": {"get_compiler_backend": lambda: "eager"},
    "sglang.srt.utils.hf_transformers_utils": {"get_rope_config": rope_of},
}
"""Stand-ins beside those of an EAGLE draft."""


def install_msgspec() -> None:
    if importlib.util.find_spec("msgspec") is None:
        WheelModules(Path(), "msgspec", (), {"msgspec": {"Struct": Struct}}).install()


class SglangBlockReader:
    """The draft that SGLang loads from ``given``'s directory."""

    def __init__(self, given: BlockSample) -> None:
        content = json.loads((given.directory / "config.json").read_text())
        config = Qwen3Config.from_pretrained(given.directory)
        for name, value in content.items():
            if not hasattr(config, name):
                setattr(config, name, value)
        (architecture,) = content["architectures"]
        kind = "dspark" if architecture == "Qwen3DSparkModel" else "dflash"
        self.model = getattr(importlib.import_module(f"{MODELS}.{kind}"), architecture)(config)
        for name, parameter in self.model.named_parameters():
            if name.startswith(("fc.", "markov_head.", "confidence_head.")):
                parameter.data.fill_(float("nan"))
        self.model.load_weights(load_file(given.directory / "model.safetensors").items())
        left = [name for name, p in self.model.named_parameters() if p.isnan().any()]
        assert not left, f"SGLang left {left} unloaded"
        self.given, self.kind = given, kind
        assert int(self.model.draft_config.resolve_block_size(default=0)) == (
            given.case.config.block_size
        )

    @torch.no_grad()
    def block(self, anchor: int) -> tuple[Tensor, Tensor | None]:
        """Logits [B, V] of the block at ``anchor``, teacher-forced, and the confidence [B]."""
        given, config = self.given, self.given.case.config
        c = self.model.project_target_hidden(given.features[:anchor])
        positions = torch.arange(anchor)
        for layer in self.model.layers:
            attention = layer.self_attn
            k, v = attention.kv_proj_only(c)
            k = attention.apply_k_rope(positions, attention.apply_k_norm(k))
            attention.attn.set_context(k, v)
        ids = torch.full((config.block_size,), config.mask_token)
        ids[0] = given.tokens[anchor]
        output = self.model(
            ids, anchor + torch.arange(config.block_size), None,
            input_embeds=given.case.embedding[ids],
        )  # fmt: skip
        hidden = output if isinstance(output, Tensor) else output.hidden_states
        logits = hidden @ given.case.output_weight.t()
        if self.kind == "dflash":
            return logits, None
        previous = given.tokens[anchor : anchor + config.block_size]
        head = self.model.markov_head
        state, biases = head.init_state(hidden[:1]), []
        for slot in range(config.block_size):
            bias, state = head.step_bias(
                previous[slot : slot + 1], hidden_states=hidden[slot : slot + 1], state=state
            )
            biases.append(bias)
        embedded = head.get_prev_embeddings(previous)
        return logits + torch.cat(biases), self.model.confidence_head(hidden, embedded)
