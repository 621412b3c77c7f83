"""The oracle's configuration and its transformer layer: dense masks, full softmax.

Shapes are batch-first, as in eagle3.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference.mla import ReferenceMLA

NORM_FLAGS = ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual")
MLA = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim")
KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ReferenceConfig:
    """Shape of the draft and of its objective.

    `mask_out_of_vocab` drops the rows whose base argmax the draft cannot say. `detach_steps` cuts
    the fed-back hidden between steps; cached keys and values still reach their projections.
    With a `kv_lora_rank` attention is multi-latent, and `head_dim` a head's part without position.
    `qk_norm` is an RMSNorm of each head's queries and keys, before they turn.
    `fc_norm` and `norm_output` together are EAGLE-3.1. `eagle1` reads [embedding ; hidden] through
    fc at every step, has no norms around its layers, and regresses the hidden with `regression`.
    """

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    num_layers: int = 1
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    num_aux: int = 3
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rms_eps: float = 1e-5
    ttt_steps: int = 3
    step_decay: float = 0.8
    mask_out_of_vocab: bool = False
    detach_steps: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    qk_norm: bool = False
    eagle1: bool = False
    regression: float = 10.0
    mask_token: int | None = None
    num_experts: int = 0
    topk: int = 2
    balance: float = 0.0
    loss: str = "kl"
    lk_decay: float = 3.0

    @classmethod
    def from_hf(cls, path: Path, **objective: Any) -> ReferenceConfig:
        """Read config.json; `objective` sets what it does not hold (ttt_steps, step_decay, ...)."""
        hf = json.loads(path.read_text(encoding="utf-8"))
        for flag in ("attention_bias", "mlp_bias"):
            if hf.get(flag):
                raise ValueError(f"{path}: the oracle does not implement {flag}={hf[flag]}")
        if hf.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{path}: the oracle does not implement hidden_act={hf['hidden_act']}")
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        mla = {name: hf.get(name) or 0 for name in MLA}
        if kind not in ("default", *(["yarn"] if mla["kv_lora_rank"] else ["linear", "llama3"])):
            raise ValueError(f"{path}: the oracle does not implement rope_type={kind}")
        hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
        layer_ids = (hf.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        return cls(
            hidden_size=hidden,
            target_hidden_size=hf.get("target_hidden_size") or hidden,
            intermediate_size=hf["intermediate_size"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("qk_nope_head_dim") or hf.get("head_dim") or hidden // heads,
            **mla,
            vocab_size=hf["vocab_size"],
            draft_vocab_size=hf["draft_vocab_size"],
            num_layers=hf["num_hidden_layers"],
            num_aux=hf.get("num_aux_hidden_states") or (len(layer_ids) if layer_ids else 3),
            rope_theta=rope.get("rope_theta") or hf["rope_theta"],
            rope_scaling=None if kind == "default" else {**rope, "rope_type": kind},
            rms_eps=hf["rms_norm_eps"],
            mask_token=hf.get("ptd_token_id"),
            qk_norm=hf.get("architectures") == ["Eagle3Qwen3ForCausalLM"],
            **{flag: bool(hf.get(flag)) for flag in NORM_FLAGS},
            **objective,
        )


def scaled(frequency: Tensor, scaling: dict[str, Any] | None) -> Tensor:
    """Rotary frequencies for longer contexts: all divided by a factor (linear), or those whose
    wavelength is long, with a ramp between two bounds (Llama 3)."""
    if scaling is None:
        return frequency
    slow = frequency / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * torch.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * slow + share * frequency


def rotate(x: Tensor, positions: Tensor, config: ReferenceConfig) -> Tensor:
    """Llama's rotary embedding: x [B, heads, S, head_dim], positions [S]; halves, not pairs."""
    half = x.shape[-1] // 2
    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    frequency = scaled(frequency, config.rope_scaling)
    angle = positions.double()[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def query_aligned_mask(length: int, step: int) -> Tensor:
    """bool [S, (step + 1) * S]: row p sees step-0 keys 0..p and its own key of each later step."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    diagonal = torch.eye(length, dtype=torch.bool)
    return torch.cat([causal] + [diagonal] * step, dim=1)


class ReferenceAttention(nn.Module):
    def __init__(self, config: ReferenceConfig, input_size: int) -> None:
        super().__init__()
        self.config = config
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(input_size, q_size, bias=False)
        self.k_proj = nn.Linear(input_size, kv_size, bias=False)
        self.v_proj = nn.Linear(input_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_eps)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, past: list[KeyValue]) -> Tensor:
        """x [B, S, input] of step len(past); appends this step's key and value to `past`."""
        length, step = x.shape[1], len(past)
        positions = torch.arange(length) + step
        q, k = self.heads(self.q_proj(x)), self.heads(self.k_proj(x))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(each, positions, self.config) for each in (q, k))
        past.append((k, self.heads(self.v_proj(x))))
        repeat = self.config.num_heads // self.config.num_kv_heads
        keys = torch.cat([k for k, _ in past], dim=2).repeat_interleave(repeat, dim=1)
        values = torch.cat([v for _, v in past], dim=2).repeat_interleave(repeat, dim=1)
        scores = q @ keys.transpose(-1, -2) / self.config.head_dim**0.5
        scores = scores.masked_fill(~query_aligned_mask(length, step), float("-inf"))
        out = torch.softmax(scores, dim=-1) @ values
        return self.o_proj(out.transpose(1, 2).flatten(2))


class ReferenceMLP(nn.Module):
    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ReferenceMoE(nn.Module):
    """Every token's `topk` experts, weighted by the softmax over their scores; `balances` keeps the
    Switch balance loss of every pass, E sum_e f_e P_e with f the share of choices and P the mean
    probability of each expert."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(ReferenceMLP(config) for _ in range(config.num_experts))
        self.balances: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        best = scores.topk(self.config.topk, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, best.indices, best.values.softmax(-1))
        chosen = torch.zeros_like(scores).scatter(-1, best.indices, 1.0)
        shares = chosen.flatten(0, -2).mean(0) / self.config.topk
        mean = scores.softmax(-1).flatten(0, -2).mean(0)
        self.balances.append(self.config.num_experts * (shares * mean).sum())
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (outputs * weights.unsqueeze(-2)).sum(-1)


class ReferenceLayer(nn.Module):
    """EAGLE-3's layer 0 reads [embedding ; hidden] (2H), EAGLE-1's the hidden without a norm; later
    layers read the normed hidden."""

    def __init__(self, config: ReferenceConfig, first: bool) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.plain = first and config.eagle1
        first = first and not config.eagle1
        if not self.plain:
            self.input_layernorm = nn.RMSNorm(size, eps=config.rms_eps)
        if first:
            self.hidden_norm = nn.RMSNorm(size, eps=config.rms_eps)
        width = 2 * size if first else size
        self.self_attn = (
            ReferenceMLA(config, width, query_aligned_mask)
            if config.kv_lora_rank
            else ReferenceAttention(config, width)
        )
        self.post_attention_layernorm = nn.RMSNorm(size, eps=config.rms_eps)
        self.mlp = ReferenceMoE(config) if config.num_experts else ReferenceMLP(config)
        self.first = first

    def forward(self, hidden: Tensor, embedding: Tensor, past: list[KeyValue]) -> Tensor:
        if self.plain:
            x = hidden
        elif self.first:
            normed = self.hidden_norm(hidden)
            x = torch.cat([self.input_layernorm(embedding), normed], dim=-1)
            hidden = normed if self.config.norm_before_residual else hidden
        else:
            x = self.input_layernorm(hidden)
        hidden = hidden + self.self_attn(x, past)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))
