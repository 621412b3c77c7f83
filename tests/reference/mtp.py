"""The oracle of a base's own next-token module: plain PyTorch, dense masks, every expert computed.

Nothing here comes from the package under test or from Megatron. Shapes are batch-first: B batch,
S sequence, H hidden, V vocabulary, K steps, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference.layers import KeyValue, query_aligned_mask
from tests.reference.losses import soft_cross_entropy
from tests.reference.mla import ReferenceMLA


@dataclass(frozen=True)
class MTPConfig:
    """Sizes of the module and its objective. With a `kv_lora_rank` attention is multi-latent, and
    `head_dim` a head's part without position; otherwise the first `rotary` channels of a head
    turn. Experts are chosen among the best `topk_group` of `groups` groups. `qwen3_next`: norms
    multiply by 1 + weight, attention's output and the shared expert have gates, and experts are
    weighted by a softmax."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    num_experts: int = 0
    topk: int = 0
    expert_size: int = 0
    shared_size: int = 0
    groups: int = 1
    topk_group: int = 1
    scaling: float = 1.0
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rms_eps: float = 1e-5
    hidden_first: bool = False
    qwen3_next: bool = False
    steps: int = 3
    step_decay: float = 0.8
    detach_steps: bool = False


class CenteredNorm(nn.Module):
    """An RMSNorm that multiplies by 1 + weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * scale * (1 + self.weight)


def norm_of(config: MTPConfig, size: int) -> nn.Module:
    kind = CenteredNorm if config.qwen3_next else nn.RMSNorm
    return kind(size, eps=config.rms_eps)


def turned(x: Tensor, positions: Tensor, config: MTPConfig) -> Tensor:
    """x [B, heads, S, d] with its first `rotary` channels turned: halves, not pairs."""
    half = config.rotary // 2
    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions.double()[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class GroupedAttention(nn.Module):
    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.config = config
        size, bias = config.hidden_size, config.qkv_bias
        queries, keys = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.q_proj = nn.Linear(size, queries * (1 + config.qwen3_next), bias=bias)
        self.k_proj = nn.Linear(size, keys, bias=bias)
        self.v_proj = nn.Linear(size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, size, bias=False)
        if config.qk_norm:
            self.q_norm = norm_of(config, config.head_dim)
            self.k_norm = norm_of(config, config.head_dim)

    def forward(self, x: Tensor, past: list[KeyValue]) -> Tensor:
        """x [B, S, H] of step len(past); appends this step's key and value to `past`."""
        config, (length, step) = self.config, (x.shape[1], len(past))
        q, k, v = (
            layer(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for layer, heads in (
                (self.q_proj, config.num_heads),
                (self.k_proj, config.num_kv_heads),
                (self.v_proj, config.num_kv_heads),
            )
        )
        q, gate = q.split([config.head_dim, q.shape[-1] - config.head_dim], dim=-1)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        positions = torch.arange(length) + step
        past.append((turned(k, positions, config), v))
        repeat = config.num_heads // config.num_kv_heads
        keys, values = (
            torch.cat(each, dim=2).repeat_interleave(repeat, dim=1)
            for each in zip(*past, strict=True)
        )
        scores = turned(q, positions, config) @ keys.transpose(-1, -2) / config.head_dim**0.5
        scores = scores.masked_fill(~query_aligned_mask(length, step), float("-inf"))
        attended = scores.softmax(-1) @ values
        if config.qwen3_next:
            attended = attended * torch.sigmoid(gate)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        size = (config.num_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.zeros(size), requires_grad=False)
        bias = torch.zeros(config.num_experts)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)


class Experts(nn.Module):
    """DeepSeek-V3's: sigmoids, chosen with a bias, weighted without it; and shared experts."""

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.config, size = config, config.hidden_size
        self.gate = Gate(config)
        self.experts = nn.ModuleList(
            GatedMLP(size, config.expert_size) for _ in range(config.num_experts)
        )
        self.shared_experts = GatedMLP(size, config.shared_size)

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        scores = torch.sigmoid(x @ self.gate.weight.t())
        choice = scores + self.gate.e_score_correction_bias
        grouped = choice.unflatten(-1, (config.groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
        open_groups = torch.zeros(grouped.shape[:-1], dtype=torch.bool).scatter(-1, best, True)
        choice = grouped.masked_fill(~open_groups.unsqueeze(-1), float("-inf")).flatten(-2)
        chosen = torch.zeros_like(choice, dtype=torch.bool)
        chosen = chosen.scatter(-1, choice.topk(config.topk, dim=-1).indices, True)
        weights = scores * chosen
        weights = config.scaling * weights / weights.sum(-1, keepdim=True)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (outputs * weights.unsqueeze(-2)).sum(-1) + self.shared_experts(x)


class GatedExperts(nn.Module):
    """Qwen3-Next's: a softmax, renormalised over the chosen; and one shared expert with a gate."""

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.config, size = config, config.hidden_size
        self.gate = nn.Linear(size, config.num_experts, bias=False).requires_grad_(False)
        self.experts = nn.ModuleList(
            GatedMLP(size, config.expert_size) for _ in range(config.num_experts)
        )
        self.shared_expert = GatedMLP(size, config.shared_size)
        self.shared_expert_gate = nn.Linear(size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        kept = scores.topk(self.config.topk, dim=-1).values[..., -1:]
        weights = scores * (scores >= kept)
        weights = weights / weights.sum(-1, keepdim=True)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        shared = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return (outputs * weights.unsqueeze(-2)).sum(-1) + shared


class ReferenceMTP(nn.Module):
    """The module; its layer's parameters carry Hugging Face's names."""

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.config, size = config, config.hidden_size
        self.embedding_norm = norm_of(config, size)
        self.hidden_norm = norm_of(config, size)
        self.joining = nn.Linear(2 * size, size, bias=False)
        self.input_layernorm = norm_of(config, size)
        # DeepSeek's latents are normed with an epsilon of their own.
        latents = replace(config, rms_eps=1e-6)
        self.self_attn = (
            ReferenceMLA(latents, size, query_aligned_mask)
            if config.kv_lora_rank
            else GroupedAttention(config)
        )
        self.post_attention_layernorm = norm_of(config, size)
        experts = GatedExperts if config.qwen3_next else Experts
        self.mlp = (
            experts(config) if config.num_experts else GatedMLP(size, config.intermediate_size)
        )
        self.final_norm = norm_of(config, size)

    def step(self, hidden: Tensor, embedding: Tensor, past: list[KeyValue]) -> Tensor:
        """One use of the module: [B, S, H] each -> what the head and the next step read."""
        halves = [self.embedding_norm(embedding), self.hidden_norm(hidden)]
        x = self.joining(torch.cat(halves[::-1] if self.config.hidden_first else halves, dim=-1))
        x = x + self.self_attn(self.input_layernorm(x), past)
        return self.final_norm(x + self.mlp(self.post_attention_layernorm(x)))

    def forward(
        self, final: Tensor, tokens: Tensor, mask: Tensor, embedding: Tensor, head: Tensor
    ) -> dict[str, Tensor]:
        """Run K steps behind the base's final hidden [B, S, H] of tokens [B, S], supervised by mask
        [B, S], with the base's embedding and head [V, H].

        Row p of step t reads x[p+1+t] and is judged by the base's row p+1+t, if that token exists
        and is supervised. Returns the sums over rows [K] of losses, rows and hits.
        """
        length, past, hidden = tokens.shape[1], [], final
        losses, rows, hits = [], [], []
        base = final @ head.t()
        for t in range(self.config.steps):
            read = torch.cat([tokens[:, t + 1 :], torch.zeros_like(tokens[:, : t + 1])], dim=1)
            hidden = self.step(hidden, embedding[read], past)
            count = max(length - t - 1, 0)
            valid = mask[:, t : t + count] == 1
            logits, target = (hidden @ head.t())[:, :count], base[:, t + 1 :]
            losses.append((soft_cross_entropy(logits, target) * valid).sum())
            rows.append(valid.sum())
            hits.append((valid & (logits.argmax(-1) == target.argmax(-1))).sum())
            hidden = hidden.detach() if self.config.detach_steps else hidden
        return {"loss": torch.stack(losses), "rows": torch.stack(rows), "hits": torch.stack(hits)}

    @torch.no_grad()
    def draft(
        self, final: Tensor, tokens: Tensor, count: int, embedding: Tensor, head: Tensor
    ) -> list[int]:
        """Return the `count` tokens drafted behind tokens [n + 1], of which final [n, H] is the
        base's final hidden of all but the last: the chain begins at row n - 1."""
        past: list[KeyValue] = []
        drafted: list[int] = []
        hidden, read = final[None], tokens[None, 1:]
        for _ in range(count):
            hidden = self.step(hidden, embedding[read], past)
            drafted.append(int((hidden[0, -1] @ head.t()).argmax()))
            # Later steps are judged at the last row alone; the others read any token.
            read = torch.full_like(read, drafted[-1])
        return drafted
