"""The oracle of block drafts (DFlash, DSpark): plain PyTorch, one anchor at a time, no mask.

A block is computed by itself from the rows before its anchor, so nothing here knows of other
blocks, of documents in one row, or of plans. Parameters carry the names of the Hugging Face files.
Shapes: S tokens of one document, H hidden, A captured layers, V base vocabulary, D draft
vocabulary, B slots of a block, K judged slots, r rank of the Markov head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockConfig:
    """Shape of the draft and of its objective; ``next_token`` is DSpark's layout of slots."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    mask_token: int
    block_size: int = 4
    num_layers: int = 2
    num_aux: int = 3
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5
    next_token: bool = False
    markov: str | None = None
    rank: int = 6
    confidence: bool = False
    decay: float | None = 4.0  # None: D-PACE
    ce: float = 1.0
    kl: float = 0.0
    l1: float = 0.0
    confidence_weight: float = 1.0
    counts_data: bool = False  # hits are of the data's tokens, not of the base's

    @property
    def drafts(self) -> int:
        return self.block_size if self.next_token else self.block_size - 1


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding of x [n, heads, d] at positions [n]; halves, not pairs."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions.double()[:, None] * frequency
    cos, sin = (f(angle).to(x.dtype).unsqueeze(1) for f in (torch.cos, torch.sin))
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class BlockAttention(nn.Module):
    def __init__(self, c: BlockConfig) -> None:
        super().__init__()
        self.config = c
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, eps=c.rms_eps)
        self.k_norm = nn.RMSNorm(c.head_dim, eps=c.rms_eps)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, H] of one block whose anchor follows ``context`` [a, H]."""
        c, a = self.config, len(context)
        both = torch.cat([context, x])
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, c.head_dim)))
        k = self.k_norm(self.k_proj(both).unflatten(-1, (-1, c.head_dim)))
        v = self.v_proj(both).unflatten(-1, (-1, c.head_dim))
        positions = torch.arange(a + len(x))
        q, k = rotate(q, positions[a:], c.rope_theta), rotate(k, positions, c.rope_theta)
        repeat = c.num_heads // c.num_kv_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / c.head_dim**0.5
        return self.o_proj(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))


class BlockLayer(nn.Module):
    def __init__(self, c: BlockConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_eps)
        self.self_attn = BlockAttention(c)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(c.hidden_size, c.intermediate_size, bias=False),
                "up_proj": nn.Linear(c.hidden_size, c.intermediate_size, bias=False),
                "down_proj": nn.Linear(c.intermediate_size, c.hidden_size, bias=False),
            }
        )

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), context)
        x = self.post_attention_layernorm(hidden)
        gated = F.silu(self.mlp["gate_proj"](x)) * self.mlp["up_proj"](x)
        return hidden + self.mlp["down_proj"](gated)


class MarkovHead(nn.Module):
    def __init__(self, c: BlockConfig) -> None:
        super().__init__()
        self.kind, r, h = c.markov, c.rank, c.hidden_size
        self.markov_w1 = nn.Embedding(c.vocab_size, r)
        self.markov_w2 = nn.Linear(r, c.draft_vocab_size, bias=False)
        if c.markov == "gated":
            self.gate_proj = nn.Linear(h + r, r)
        if c.markov == "rnn":
            self.joint_proj = nn.Linear(2 * r + h, 3 * r)

    def forward(self, previous: Tensor, hidden: Tensor) -> Tensor:
        """Bias of the logits [B, D] of one block, from the tokens before its slots [B]."""
        e = self.markov_w1(previous)
        if self.kind == "gated":
            e = torch.sigmoid(self.gate_proj(torch.cat([hidden, e], -1))) * e
        if self.kind == "rnn":
            state, outputs = torch.zeros_like(e[0]), []
            for k in range(len(e)):
                u, c, o = self.joint_proj(torch.cat([state, e[k], hidden[k]])).chunk(3)
                state = torch.sigmoid(u) * state + (1 - torch.sigmoid(u)) * torch.tanh(c)
                outputs.append(torch.tanh(o))
            e = torch.stack(outputs)
        return self.markov_w2(e)


class ReferenceBlocks(nn.Module):
    """The draft beside its base's ``embedding`` and ``output`` rows [V, H], both frozen."""

    def __init__(
        self, config: BlockConfig, embedding: Tensor, output: Tensor, vocab_ids: Tensor
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding, self.output, self.vocab_ids = embedding, output, vocab_ids
        h = config.hidden_size
        self.fc = nn.Linear(config.num_aux * h, h, bias=False)
        self.hidden_norm = nn.RMSNorm(h, eps=config.rms_eps)
        self.layers = nn.ModuleList(BlockLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(h, eps=config.rms_eps)
        if config.markov is not None:
            self.markov_head = MarkovHead(config)
        if config.confidence:
            self.confidence_head = nn.ModuleDict({"proj": nn.Linear(h + config.rank, 1)})

    def block(self, features: Tensor, anchor: int, token: int | Tensor) -> Tensor:
        """Return the normed outputs [B, H] of the block at ``anchor`` of a document whose captured
        hidden states are ``features`` [S, A * H]; rows from the anchor on are not read."""
        c = self.hidden_norm(self.fc(features[:anchor]))
        mask = self.embedding[self.config.mask_token]
        hidden = torch.stack([self.embedding[token], *[mask] * (self.config.block_size - 1)])
        for layer in self.layers:
            hidden = layer(hidden, c)
        return self.norm(hidden)

    def logits(self, outputs: Tensor, previous: Tensor | None) -> Tensor:
        """Logits [B, D] of a block's outputs; ``previous`` [B] are the tokens before its slots."""
        logits = outputs @ self.output[self.vocab_ids].to(outputs).t()
        if self.config.markov is not None:
            assert previous is not None
            logits = logits + self.markov_head(previous, outputs)
        return logits

    @torch.no_grad()
    def draft(self, features: Tensor, prefix: Tensor) -> list[int]:
        """Greedy drafts behind ``prefix`` [a + 1], whose last token is the anchor, from the
        captured hidden states [a, A * H] of all others: base ids, chosen from left to right."""
        c, anchor = self.config, len(prefix) - 1
        outputs = self.block(features, anchor, prefix[anchor])
        previous = torch.full((c.block_size,), int(prefix[anchor]))
        drafts = []
        for slot in range(c.block_size):
            token = int(self.vocab_ids[self.logits(outputs, previous)[slot].argmax()])
            previous[slot + 1 :] = token
            drafts.append(token)
        return drafts if c.next_token else drafts[1:]

    def judge(
        self, features: Tensor, final: Tensor, tokens: Tensor, anchor: int, count: int
    ) -> dict[str, Any]:
        """Score the first ``count`` judged slots of one block, row by row.

        ``final`` [S, H]: the base's final hidden states. Slot t is judged by base row anchor + t
        and by token anchor + t + 1.
        """
        c = self.config
        outputs = self.block(features, anchor, tokens[anchor])
        previous = None
        if c.next_token:
            padded = torch.cat([tokens, tokens.new_zeros(c.block_size)])
            previous = padded[anchor : anchor + c.block_size]
        first = 0 if c.next_token else 1
        logits = self.logits(outputs, previous)[first : first + count]
        base = final[anchor : anchor + count] @ self.output.to(final).t()
        label = tokens[anchor + 1 : anchor + 1 + count]
        position = torch.searchsorted(self.vocab_ids, label).clamp(max=len(self.vocab_ids) - 1)
        inside = self.vocab_ids[position] == label
        log_q = logits.log_softmax(-1)
        ce = torch.where(inside, -log_q[torch.arange(count), position], torch.zeros(()).to(log_q))
        p = base[:, self.vocab_ids].softmax(-1)
        whole = base.softmax(-1)
        wide_q = torch.zeros_like(whole).index_copy(1, self.vocab_ids, log_q.exp())
        l1 = (wide_q - whole).abs().sum(-1)
        alpha = 1 - l1.detach() / 2
        loss = c.ce * ce + c.kl * -(p * log_q).sum(-1) + c.l1 * l1
        if c.confidence:
            assert previous is not None
            e = self.markov_head.markov_w1(previous[:count])
            read = torch.cat([outputs[first : first + count], e], -1)
            logit = self.confidence_head["proj"](read).squeeze(-1)
            bce = F.binary_cross_entropy_with_logits(logit, alpha, reduction="none")
            total = loss + c.confidence_weight * bce
        else:
            total, bce = loss, torch.zeros_like(loss)
        right = torch.where(inside, (-ce).exp(), torch.zeros_like(ce)).detach()
        hits = self.vocab_ids[logits.argmax(-1)] == (label if c.counts_data else base.argmax(-1))
        return {
            "loss": loss, "total": total, "weights": self.weights(right), "hits": hits,
            "alpha": alpha, "logits": logits, "bce": bce.detach(),
        }  # fmt: skip

    def weights(self, right: Tensor) -> Tensor:
        """Weights of a block's judged slots, whose tokens have the probabilities ``right``."""
        if self.config.decay is not None:
            return torch.exp(-torch.arange(len(right)).to(right) / self.config.decay)
        return d_pace(right)


def d_pace(right: Tensor, floor: float = 0.5) -> Tensor:
    """D-PACE: w_j = sum over m >= j of prod_{i <= m} ((1 - floor) q_i + floor)."""
    chances = ((1 - floor) * right + floor).cumprod(0)
    return torch.stack([chances[j:].sum() for j in range(len(right))])


def judged_slots(supervised: list[bool], anchor: int, most: int) -> int:
    """How many slots behind ``anchor`` are judged: the run of supervised tokens that follows."""
    count = 0
    while count < most and anchor + 1 + count < len(supervised) and supervised[anchor + 1 + count]:
        count += 1
    return count
