"""An exported block draft in plain PyTorch, built from its files alone: it verifies exports.

As ``plain_draft.py``, and for the same reason without any code of training or of the writer: one
block at a time, no mask, and RoPE angles from transformers.

Shapes: S context tokens, B slots, H hidden, A aux layers, V base vocabulary, D draft vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, silu

ARCHITECTURES = ("DFlashDraftModel", "Qwen3DSparkModel", "DFlashSpeculator", "DSparkSpeculator")


class BlockOutputs(NamedTuple):
    """What the heads read and add: hidden [B, H]; bias [B, D] and confidence [B] of DSpark, else
    None."""

    hidden: Tensor
    bias: Tensor | None
    confidence: Tensor | None


def is_block_draft(directory: Path) -> bool:
    """Tell whether the files in ``directory`` are a block draft's."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config["architectures"][0] in ARCHITECTURES


class PlainBlockDraft:
    """The draft in ``directory``, in fp32 whatever the dtype of the files."""

    def __init__(self, directory: Path) -> None:
        from transformers import Qwen3Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self.config: dict[str, Any] = config
        self.layers: dict[str, Any] = config.get("transformer_layer_config", config)
        self.tensors = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in load_file(directory / "model.safetensors").items()
        }
        self.rope = Qwen3RotaryEmbedding(Qwen3Config(**self.layers))

    @torch.no_grad()
    def run(self, features: Tensor, block: Tensor, previous: Tensor) -> BlockOutputs:
        """Run one block behind a context.

        Args:
            features: [S, A * H], the aux hidden states of the tokens before the anchor.
            block: [B, H], the embeddings of the anchor and of the mask token.
            previous: [B], the token before the one that each slot says.
        """
        context = self._norm("hidden_norm.weight", linear(features, self.tensors["fc.weight"]))
        hidden = block
        for layer in range(self.layers["num_hidden_layers"]):
            hidden = self._layer(f"layers.{layer}.", hidden, context)
        hidden = self._norm("norm.weight", hidden)
        if "markov_rank" not in self.config:
            return BlockOutputs(hidden, None, None)
        embedded = embedding(previous, self.tensors["markov_head.markov_w1.weight"])
        bias = linear(self._markov(hidden, embedded), self.tensors["markov_head.markov_w2.weight"])
        confidence = None
        if self.config["enable_confidence_head"]:
            assert self.config["confidence_head_with_markov"]
            both = torch.cat([hidden, embedded], dim=-1)
            confidence = self._linear("confidence_head.proj", both).squeeze(-1)
        return BlockOutputs(hidden, bias, confidence)

    def _markov(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Return what W2 multiplies, [B, r], from hidden [B, H] and W1's rows [B, r]."""
        kind = self.config["markov_head_type"]
        if kind == "vanilla":
            return embedded
        if kind == "gated":
            gate = self._linear("markov_head.gate_proj", torch.cat([hidden, embedded], dim=-1))
            return torch.sigmoid(gate) * embedded
        state, outputs = torch.zeros_like(embedded[0]), []
        for h, e in zip(hidden, embedded, strict=True):
            joint = self._linear("markov_head.joint_proj", torch.cat([state, e, h]))
            update, candidate, output = joint.chunk(3)
            update = torch.sigmoid(update)
            state = update * state + (1 - update) * torch.tanh(candidate)
            outputs.append(torch.tanh(output))
        return torch.stack(outputs)

    def _layer(self, prefix: str, hidden: Tensor, context: Tensor) -> Tensor:
        """Run one layer on a block's rows [B, H]."""
        x = self._norm(f"{prefix}input_layernorm.weight", hidden)
        hidden = hidden + self._attention(f"{prefix}self_attn.", x, context)
        x = self._norm(f"{prefix}post_attention_layernorm.weight", hidden)
        gate, up, down = (
            self.tensors[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        return hidden + linear(silu(linear(x, gate)) * linear(x, up), down)

    def _attention(self, prefix: str, x: Tensor, context: Tensor) -> Tensor:
        heads, groups = self.layers["num_attention_heads"], self.layers["num_key_value_heads"]
        both = torch.cat([context, x])
        q, k, v = (
            linear(rows, self.tensors[f"{prefix}{name}_proj.weight"]).unflatten(-1, (count, -1))
            for name, rows, count in (("q", x, heads), ("k", both, groups), ("v", both, groups))
        )
        q = self._norm(f"{prefix}q_norm.weight", q)
        k = self._norm(f"{prefix}k_norm.weight", k)
        cos, sin = (part[0] for part in self.rope(both[None], torch.arange(len(both))[None]))
        q, k = _rotated(q, cos[len(context) :], sin[len(context) :]), _rotated(k, cos, sin)
        k, v = (part.repeat_interleave(heads // groups, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        return linear(out.flatten(1), self.tensors[f"{prefix}o_proj.weight"])

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.tensors[name]
        return rms_norm(x, (weight.numel(),), weight, self.layers["rms_norm_eps"])


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [n, heads, d] by angles [n, d]; channels i and i + d / 2 are a pair."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)
