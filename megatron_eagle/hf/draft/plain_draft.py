"""An exported draft as its files alone describe it: plain PyTorch, one sequence, dense attention.

What a server would compute, written from the formats' definitions and sharing nothing with the
training code: the other side of ``tools/convert_to_hf.py --verify``. RoPE is transformers' own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from megatron_eagle.algorithms import Eagle1
from megatron_eagle.hf.draft.config_json import MLA
from megatron_eagle.hf.draft.plain_mla import PlainMLA

KeyValues = list[tuple[Tensor, Tensor]]


class PlainDraft:
    """The draft in ``directory``, in fp32 whatever the files' dtype."""

    def __init__(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        nested = config.get("eagle_config", {})
        self.layer_config: dict[str, Any] = config.get("transformer_layer_config", config)
        self.is_eagle1 = config["architectures"][0] in Eagle1.architectures.values()
        self.norm_output = config.get("norm_output", False)
        self.norm_before_fc = config.get("norm_before_fc", nested.get("norm_before_fc", False))
        self.norm_before_residual = config.get("norm_before_residual", False)
        self.tensors = {
            name.removeprefix("model."): tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in load_file(directory / "model.safetensors").items()
        }
        self.heads = self.layer_config["num_attention_heads"]
        self.groups = self.layer_config["num_key_value_heads"]
        self.mla: PlainMLA | None = None
        if config["architectures"] == [MLA]:
            self.mla = PlainMLA(self.layer_config)
        else:
            self.rope = _rotary(self.layer_config)

    @torch.no_grad()
    def run(
        self,
        features: Tensor,
        embeddings: Tensor,
        steps: int,
        mask_embedding: Tensor | None = None,
    ) -> list[Tensor]:
        """Logits over the draft vocabulary of ``steps`` TTT steps, [S, D] each; for EAGLE-1, whose
        head is the base's, the hidden states [S, H].

        features [S, A * H]: captured layers (EAGLE-1: final hidden [S, H]). embeddings
        [S + steps - 1, H]: step t consumes rows t onwards. ``mask_embedding`` [H]: of the mask
        token, which P-EAGLE's later steps consume instead.
        """
        rows = features.shape[0]
        seen: list[KeyValues] = [[] for _ in range(self.layer_config["num_hidden_layers"])]
        hidden, outputs = self._start(features), []
        for step in range(steps):
            embedding = embeddings[step : step + rows]
            if step > 0 and "mask_hidden" in self.tensors:
                assert mask_embedding is not None
                embedding = mask_embedding.expand_as(embedding)
                hidden = self._start(self.tensors["mask_hidden"]).expand_as(embedding)
            for layer, known in enumerate(seen):
                hidden = self._layer(layer, embedding, hidden, step, known)
            normed = hidden if self.is_eagle1 else self._norm("norm.weight", hidden)
            head = None if self.is_eagle1 else self.tensors["lm_head.weight"]
            outputs.append(normed if head is None else linear(normed, head))
            hidden = normed if self.norm_output else hidden
        return outputs

    def _start(self, features: Tensor) -> Tensor:
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

    def _layer(
        self, layer: int, embedding: Tensor, hidden: Tensor, step: int, known: KeyValues
    ) -> Tensor:
        own = self._own(layer)
        residual = hidden
        if layer == 0 and self.is_eagle1:
            bias = self.tensors.get("fc.bias")
            x = residual = linear(
                torch.cat([embedding, hidden], -1), self.tensors["fc.weight"], bias
            )
        elif layer == 0:
            normed = self._norm(f"{own}hidden_norm.weight", hidden)
            residual = normed if self.norm_before_residual else hidden
            x = torch.cat([self._norm(f"{own}input_layernorm.weight", embedding), normed], -1)
        else:
            name = f"{own}input_layernorm.weight"
            x = self._norm(name if name in self.tensors else f"{own}hidden_norm.weight", hidden)
        hidden = residual + self._attention(f"{own}self_attn.", x, step, known)
        x = self._norm(f"{own}post_attention_layernorm.weight", hidden)
        gate, up, down = (self.tensors[f"{own}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        return hidden + linear(silu(linear(x, gate)) * linear(x, up), down)

    def _attention(self, own: str, x: Tensor, step: int, known: KeyValues) -> Tensor:
        """Row p sees the step-0 keys 0..p and its own row's keys of the later steps."""
        rows = x.shape[0]
        positions = torch.arange(step, step + rows)
        if self.mla is None:
            q, k, v = self._grouped(own, x, positions)
            scale = q.shape[-1] ** -0.5
        else:
            q, k, v = self.mla(lambda name: self.tensors[f"{own}{name}.weight"], x, positions)
            scale = self.mla.scale
        known.append((k, v))
        future = torch.ones(rows, rows, dtype=torch.bool).triu(1)
        trunk = torch.einsum("phd,qhd->hpq", q, known[0][0]).masked_fill(future, -torch.inf)
        branch = [torch.einsum("phd,phd->hp", q, key).unsqueeze(-1) for key, _ in known[1:]]
        weights = (torch.cat([trunk, *branch], -1) * scale).softmax(-1)
        out = torch.einsum("hpq,qhd->phd", weights[..., :rows], known[0][1])
        for i, (_, value) in enumerate(known[1:]):
            out = out + weights[..., rows + i].t().unsqueeze(-1) * value
        return linear(out.flatten(1), self.tensors[f"{own}o_proj.weight"])

    def _grouped(self, own: str, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [S, n, d], a key for every query head."""
        q, k, v = (
            linear(x, self.tensors[f"{own}{n}_proj.weight"]).unflatten(-1, (heads, -1))
            for n, heads in (("q", self.heads), ("k", self.groups), ("v", self.groups))
        )
        cos, sin = self.rope(x[None], positions[None])
        q, k = _rotate(q, cos[0], sin[0]), _rotate(k, cos[0], sin[0])
        repeats = self.heads // self.groups
        return q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)

    def _own(self, layer: int) -> str:
        single = any(name.startswith("midlayer.") for name in self.tensors)
        return "midlayer." if single else f"layers.{layer}."

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.tensors[name]
        return rms_norm(x, (weight.numel(),), weight, self.layer_config["rms_norm_eps"])


def _rotary(config: dict[str, Any]) -> Any:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(LlamaConfig(**config))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [S, n, d] by angles [S, d], halves paired."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)
