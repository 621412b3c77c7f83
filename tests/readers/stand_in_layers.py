"""Leaf layers in plain PyTorch that stand for the servers' kernels: one process, one sequence.

Shapes are the servers': [T, features] for T tokens. Attention keeps its keys and values, so that a
prefill and the steps after it are calls of the same layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb


def load_whole(parameter: nn.Parameter, loaded: Tensor) -> None:
    assert parameter.shape == loaded.shape, (parameter.shape, loaded.shape)
    parameter.data.copy_(loaded)


class Unquantized:
    """How vLLM multiplies with a weight that is not quantized."""


class Stacked(nn.Module):
    """Several linears in one weight; ``parts`` maps a shard's id to its rows. Returns (y, None)."""

    def __init__(self, inputs: int, parts: dict[Any, int], bias: bool = False) -> None:
        super().__init__()
        assert not bias
        self.bias, self.quant_method = None, Unquantized()
        self.rows: dict[Any, slice] = {}
        for name, size in parts.items():
            start = sum(rows.stop - rows.start for rows in self.rows.values())
            self.rows[name] = slice(start, start + size)
        self.weight = nn.Parameter(torch.full((sum(parts.values()), inputs), float("nan")))
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
        """vLLM passes the shard's id as an attribute of the tensor."""
        rows = self.rows[loaded.shard_id if shard is None else shard]  # type: ignore[attr-defined]
        load_whole(nn.Parameter(parameter.data[rows]), loaded)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


class QKVParallelLinear(Stacked):
    def __init__(
        self, hidden_size: int, head_size: int, heads: int = 0, kv_heads: int = 0, **rest: Any
    ) -> None:
        heads = heads or rest["total_num_heads"]
        kv_heads = kv_heads or rest["total_num_kv_heads"]
        parts = {"q": heads * head_size, "k": kv_heads * head_size, "v": kv_heads * head_size}
        super().__init__(hidden_size, parts, rest.get("bias", False))


class MergedColumnParallelLinear(Stacked):
    def __init__(self, input_size: int, output_sizes: Sequence[int], **rest: Any) -> None:
        super().__init__(input_size, dict(enumerate(output_sizes)), rest.get("bias", False))


class Linear(nn.Module):
    """Row-parallel and replicated linears: (y, None), or y alone with ``return_bias=False``."""

    def __init__(self, input_size: int, output_size: int, **rest: Any) -> None:
        super().__init__()
        self.input_size, self.bias = input_size, None
        self.weight = nn.Parameter(torch.full((output_size, input_size), float("nan")))
        self.weight.weight_loader = load_whole  # type: ignore[attr-defined]
        if rest.get("bias", False):
            self.bias = nn.Parameter(torch.full((output_size,), float("nan")))
        self.return_bias = rest.get("return_bias", True)

    def forward(self, x: Tensor) -> Any:
        y = F.linear(x, self.weight, self.bias)
        return (y, None) if self.return_bias else y


class RMSNorm(nn.Module):
    """With a residual: adds it first, and returns the sum too, as the fused kernels do."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((hidden_size,), float("nan")))
        self.eps = self.variance_epsilon = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is not None:
            x = x + residual
        normed = F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return normed if residual is None else (normed, x)


class SiluAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


class Rows(nn.Module):
    """Vocabulary-parallel embedding and head."""

    def __init__(self, count: int, size: int, **rest: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((count, size), float("nan")))
        self.weight.weight_loader = load_whole  # type: ignore[attr-defined]

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Attention(nn.Module):
    """Causal over everything seen so far."""

    def __init__(
        self, heads: int, head_size: int, scale: float, num_kv_heads: int, **rest: Any
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size, self.scale = heads, num_kv_heads, head_size, scale
        self.keys = self.values = torch.empty(num_kv_heads, 0, head_size)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *batch: Any) -> Tensor:
        def split(x: Tensor, heads: int) -> Tensor:
            return x.view(-1, heads, self.size).transpose(0, 1)

        self.keys = torch.cat([self.keys, split(k, self.kv_heads)], dim=1)
        self.values = torch.cat([self.values, split(v, self.kv_heads)], dim=1)
        new, seen = q.shape[0], self.keys.shape[1]
        mask = torch.ones(new, seen, dtype=torch.bool).tril(seen - new)
        repeat = self.heads // self.kv_heads
        keys, values = (x.repeat_interleave(repeat, 0) for x in (self.keys, self.values))
        out = F.scaled_dot_product_attention(
            split(q, self.heads), keys, values, mask, scale=self.scale
        )
        return out.transpose(0, 1).flatten(1)


class Rope:
    """Llama's rotary embedding, as transformers computes it."""

    is_neox_style = True

    def __init__(self, head_size: int, config: LlamaConfig) -> None:
        self.head_size, self.config = head_size, config
        self.embedding = LlamaRotaryEmbedding(config)

    @property
    def cos_sin_cache(self) -> Tensor:
        """Cosines and sines of every position, [positions, head_size]."""
        positions = torch.arange(self.config.max_position_embeddings)
        tables = self.embedding(torch.empty(0), positions.unsqueeze(0))
        return torch.cat([table[0, :, : self.head_size // 2] for table in tables], dim=-1)

    def __call__(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.embedding(q, positions.unsqueeze(0))
        parts = (x.view(1, len(positions), -1, self.head_size).transpose(1, 2) for x in (q, k))
        turned = apply_rotary_pos_emb(*parts, cos, sin)
        return tuple(x.transpose(1, 2).flatten(2)[0] for x in turned)  # type: ignore[return-value]


def get_rope(head_size: int, **fields: Any) -> Rope:
    """Return the rotary embedding of the server's own arguments."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = rope.get("rope_theta", fields.get("base"))
    config = LlamaConfig(
        head_dim=head_size,
        max_position_embeddings=fields["max_position"],
        rope_parameters={"rope_type": "default", **rope, "rope_theta": theta},
    )
    return Rope(head_size, config)
