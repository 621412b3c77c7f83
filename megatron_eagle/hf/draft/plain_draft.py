"""An exported draft in plain PyTorch, built from its files alone: the reader that verifies exports.

There are two plain EAGLEs. This one ships with the package and checks a user's export: it computes
what a server would, from the definition of the formats, for one sequence with dense attention. The
other one, ``tests/reference``, is the oracle of the tests, gradients included. They share no code
with each other or with the training, so that no mistake can hide in all of them. For the same
reason this file spells out architecture names and rope fields instead of importing them from the
code that writes them. RoPE angles are transformers' own.

Reading order: ``PlainDraft`` (fc, layers, head), then ``GroupedQueries`` and ``LatentQueries`` (the
two kinds of attention inputs).

Shapes: S tokens, H hidden, A aux layers, D draft vocabulary, N inputs of a linear layer, n heads,
d and dv channels of a head's keys and values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

EAGLE1_ARCHITECTURES = ("EagleLlamaForCausalLM", "LlamaForCausalLMEagle")
MLA_ARCHITECTURE = "Eagle3DeepseekV2ForCausalLM"

KeyValues = list[tuple[Tensor, Tensor]]
"""Keys and values of one layer, one pair for each TTT step so far."""
Weights = Callable[[str], Tensor]
"""Name of a module inside the attention -> its weight."""


class PlainDraft:
    """The draft in ``directory``, in fp32 whatever the dtype of the files."""

    def __init__(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        nested = config.get("eagle_config", {})
        architecture = config["architectures"][0]
        self.layer_config: dict[str, Any] = config.get("transformer_layer_config", config)
        self.is_eagle1 = architecture in EAGLE1_ARCHITECTURES
        self.norm_output = config.get("norm_output", False)
        self.norm_before_fc = config.get("norm_before_fc", nested.get("norm_before_fc", False))
        self.norm_before_residual = config.get("norm_before_residual", False)
        self.tensors = {
            name.removeprefix("model."): tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in load_file(directory / "model.safetensors").items()
        }
        uses_mla = architecture == MLA_ARCHITECTURE
        self.queries_keys_values = (LatentQueries if uses_mla else GroupedQueries)(
            self.layer_config
        )

    @torch.no_grad()
    def run(
        self,
        features: Tensor,
        embeddings: Tensor,
        *,
        steps: int,
        mask_embedding: Tensor | None = None,
    ) -> list[Tensor]:
        """Run ``steps`` TTT steps; return the logits [S, D] of each.

        EAGLE-1, whose head is the base's, returns the hidden states [S, H] instead.

        Args:
            features: [S, A * H], the aux hidden states; for EAGLE-1 [S, H], the final ones.
            embeddings: [S + steps - 1, H]; step t reads S rows from row t on.
            steps: number of TTT steps.
            mask_embedding: [H], embedding of the mask token, which P-EAGLE's later steps read
                instead of ``embeddings``.
        """
        rows = features.shape[0]
        past: list[KeyValues] = [[] for _ in range(self.layer_config["num_hidden_layers"])]
        hidden, outputs = self._start(features), []
        for step in range(steps):
            embedding = embeddings[step : step + rows]
            if step > 0 and "mask_hidden" in self.tensors:
                assert mask_embedding is not None
                embedding = mask_embedding.expand_as(embedding)
                hidden = self._start(self.tensors["mask_hidden"]).expand_as(embedding)
            for layer, key_values in enumerate(past):
                hidden = self._layer(layer, embedding, hidden, past=key_values)
            normed = hidden if self.is_eagle1 else self._norm("norm.weight", hidden)
            head = None if self.is_eagle1 else self.tensors["lm_head.weight"]
            outputs.append(normed if head is None else linear(normed, head))
            hidden = normed if self.norm_output else hidden
        return outputs

    def _start(self, features: Tensor) -> Tensor:
        """Return the hidden state [S, H] that step 0 reads."""
        if self.is_eagle1:
            return features
        if "fc_norm.0.weight" in self.tensors:
            width = self.tensors["fc_norm.0.weight"].numel()
            parts = features.split(width, dim=-1)
            normed = [self._norm(f"fc_norm.{i}.weight", part) for i, part in enumerate(parts)]
            features = torch.cat(normed, dim=-1)
        elif self.norm_before_fc:
            features = self._norm("input_norm.weight", features)
        return linear(features, self.tensors["fc.weight"])

    def _layer(self, layer: int, embedding: Tensor, hidden: Tensor, *, past: KeyValues) -> Tensor:
        """Run one layer: [S, H] each -> [S, H]. Appends this step's keys and values to ``past``."""
        prefix = self._prefix(layer)
        residual = hidden
        if layer == 0 and self.is_eagle1:
            both, bias = torch.cat([embedding, hidden], -1), self.tensors.get("fc.bias")
            x = residual = linear(both, self.tensors["fc.weight"], bias)
        elif layer == 0:
            normed = self._norm(f"{prefix}hidden_norm.weight", hidden)
            residual = normed if self.norm_before_residual else hidden
            x = torch.cat([self._norm(f"{prefix}input_layernorm.weight", embedding), normed], -1)
        else:
            name = f"{prefix}input_layernorm.weight"
            x = self._norm(name if name in self.tensors else f"{prefix}hidden_norm.weight", hidden)
        hidden = residual + self._attention(f"{prefix}self_attn.", x, past)
        x = self._norm(f"{prefix}post_attention_layernorm.weight", hidden)
        gate, up, down = (
            self.tensors[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        return hidden + linear(silu(linear(x, gate)) * linear(x, up), down)

    def _attention(self, prefix: str, x: Tensor, past: KeyValues) -> Tensor:
        """Attend from each row p to the keys 0..p of step 0 and to the keys p of later steps."""
        rows, step = x.shape[0], len(past)
        positions = torch.arange(step, step + rows)
        q, k, v = self.queries_keys_values(
            lambda name: self.tensors[f"{prefix}{name}.weight"], x, positions
        )
        past.append((k, v))
        future = torch.ones(rows, rows, dtype=torch.bool).triu(1)
        trunk = torch.einsum("phd,qhd->hpq", q, past[0][0]).masked_fill(future, -torch.inf)
        branch = [torch.einsum("phd,phd->hp", q, key).unsqueeze(-1) for key, _ in past[1:]]
        scale = self.queries_keys_values.scale
        weights = (torch.cat([trunk, *branch], -1) * scale).softmax(-1)
        out = torch.einsum("hpq,qhd->phd", weights[..., :rows], past[0][1])
        for i, (_, value) in enumerate(past[1:]):
            out = out + weights[..., rows + i].t().unsqueeze(-1) * value
        return linear(out.flatten(1), self.tensors[f"{prefix}o_proj.weight"])

    def _prefix(self, layer: int) -> str:
        single = any(name.startswith("midlayer.") for name in self.tensors)
        return "midlayer." if single else f"layers.{layer}."

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return _rms_norm(self.tensors[name], x, self.layer_config)


class GroupedQueries:
    """Queries, keys and values of grouped-query attention, as Llama's format defines them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.scale = config["head_dim"] ** -0.5
        self.config = config
        self.has_norms = config["model_type"] == "qwen3"
        fields = {name: value for name, value in config.items() if name != "model_type"}
        self.rope = LlamaRotaryEmbedding(LlamaConfig(**fields))

    def __call__(
        self, weight: Weights, x: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v [S, n, d] of x [S, N] at ``positions`` [S], a key for every query."""
        q, k, v = (
            linear(x, weight(f"{name}_proj")).unflatten(-1, (heads, -1))
            for name, heads in (("q", self.heads), ("k", self.groups), ("v", self.groups))
        )
        if self.has_norms:
            q, k = (_rms_norm(weight(f"{n}_norm"), y, self.config) for n, y in (("q", q), ("k", k)))
        cos, sin = self.rope(x[None], positions[None])
        q, k = _rotate_halves(q, cos[0], sin[0]), _rotate_halves(k, cos[0], sin[0])
        repeats = self.heads // self.groups
        return q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)


class LatentQueries:
    """Queries, keys and values of multi-latent attention, as DeepSeek's format defines them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
            DeepseekV3RotaryEmbedding,
            yarn_get_mscale,
        )

        self.config = config
        self.heads = config["num_attention_heads"]
        self.plain_size, self.rope_size = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        fields = {name: value for name, value in config.items() if name != "model_type"}
        self.rope = DeepseekV3RotaryEmbedding(DeepseekV3Config(**fields))
        scaling = config.get("rope_scaling") or {}  # an export has it beside rope_parameters
        factor = yarn_get_mscale(scaling.get("factor", 1.0), scaling.get("mscale_all_dim") or 0.0)
        self.scale = factor**2 * (self.plain_size + self.rope_size) ** -0.5

    def __call__(
        self, weight: Weights, x: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k [S, n, d] and v [S, n, dv] of x [S, N] at ``positions`` [S]."""
        config = self.config
        if config["q_lora_rank"]:
            low_rank = _rms_norm(weight("q_a_layernorm"), linear(x, weight("q_a_proj")), config)
            q = linear(low_rank, weight("q_b_proj"))
        else:
            q = linear(x, weight("q_proj"))
        sizes = [self.plain_size, self.rope_size]
        q, q_rope = q.unflatten(-1, (self.heads, -1)).split(sizes, -1)
        down = linear(x, weight("kv_a_proj_with_mqa"))
        latent, k_rope = down.split([config["kv_lora_rank"], self.rope_size], -1)
        up = linear(_rms_norm(weight("kv_a_layernorm"), latent, config), weight("kv_b_proj"))
        sizes = [self.plain_size, config["v_head_dim"]]
        k, v = up.unflatten(-1, (self.heads, -1)).split(sizes, -1)
        cos, sin = (
            part[0, :, : self.rope_size // 2] for part in self.rope(x[None], positions[None])
        )
        q_rope = _rotate_pairs(q_rope, cos, sin)
        k_rope = _rotate_pairs(k_rope.unsqueeze(1), cos, sin).expand(-1, self.heads, -1)
        return torch.cat([q, q_rope], -1), torch.cat([k, k_rope], -1), v


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [S, n, d] by angles [S, d]; channels i and i + d / 2 are a pair."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [S, n, d] by angles [S, d / 2]; channels 2i and 2i + 1 are a pair."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def _rms_norm(weight: Tensor, x: Tensor, config: Mapping[str, Any]) -> Tensor:
    return rms_norm(x, (weight.numel(),), weight, config["rms_norm_eps"])
