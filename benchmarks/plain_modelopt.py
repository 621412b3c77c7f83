"""ModelOpt's EAGLE-3 training mathematics in plain PyTorch, for machines without ModelOpt.

Read from its Hugging Face plugin: a dense additive mask over all steps' keys, grouped keys
repeated, all logits of a step at once, log_softmax against the base's softmax. *before*: softmax
and argmax of the base in every step, and the host asked for each accuracy; *after*: both once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problem import DTYPES, Inputs, Problem

DECAY = 0.8


class PlainModelOpt:
    """Weights and inputs of ``problem`` on ``device``; call it for the loss."""

    def __init__(self, problem: Problem, device: str, before: bool, compiled: bool) -> None:
        self.problem, self.before = problem, before
        dtype = DTYPES[problem.dtype]
        self.weights = {
            name: x.to(device, dtype).detach().requires_grad_()
            for name, x in problem.weights().items()
        }
        inputs: Inputs = problem.inputs()
        self.aux = inputs.aux.to(device, dtype)
        final, head = inputs.final_hidden.to(device, dtype), inputs.output_weight.to(device, dtype)
        self.base_logits = (final @ head.t())[..., inputs.vocab_ids.to(device)]
        token_mask = inputs.loss_mask.roll(1, 1)
        token_mask[:, 0] = 0
        self.token_mask = token_mask.to(device)
        tokens, table = inputs.tokens.to(device), inputs.embedding.to(device, dtype)
        self.embeddings = F.embedding(tokens.roll(-1, 1), table)
        self.masks = [self._mask(step, device, dtype) for step in range(problem.ttt)]
        self.rotary = _rotary(problem, device, dtype)
        self.step = torch.compile(self._step, dynamic=False) if compiled else self._step
        self.loss = torch.compile(self._loss, dynamic=False) if compiled else self._loss

    @property
    def resting(self) -> list[Tensor]:
        kept = [self.aux, self.base_logits, self.token_mask, self.embeddings]
        return [*self.weights.values(), *kept, *self.masks, *self.rotary]

    def __call__(self) -> Tensor:
        problem = self.problem
        hidden = F.linear(self.aux, self.weights["fc.weight"])
        keys: list[Tensor] = []
        values: list[Tensor] = []
        total = hidden.new_zeros((), dtype=torch.float32)
        teacher = self.base_logits if self.before else self.base_logits.softmax(-1)
        best = None if self.before else self.base_logits.argmax(-1)
        hits = []
        for step in range(problem.ttt):
            output, logits, key, value = self.step(hidden, self.masks[step], keys, values)
            keys, values = [*keys, key], [*values, value]
            if self.before:
                teacher, best = self.base_logits.softmax(-1), self.base_logits.argmax(-1)
            assert best is not None
            rows = slice(1 + step, None)
            loss, hit = self.loss(
                teacher[:, rows], best[:, rows], logits[:, step:-1], self.token_mask[:, rows]
            )
            hits.append(hit.item() if self.before else hit)
            total = total + DECAY**step * loss
            hidden = output.roll(1, 1)
        return total

    def _step(
        self, hidden: Tensor, mask: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        problem, w = self.problem, self.weights
        layer = "midlayer."
        normed = torch.cat(
            [
                _norm(self.embeddings, w[f"{layer}input_layernorm.weight"]),
                _norm(hidden, w[f"{layer}hidden_norm.weight"]),
            ],
            dim=-1,
        )

        def project(name: str, heads: int) -> Tensor:
            x = F.linear(normed, w[f"{layer}self_attn.{name}_proj.weight"])
            return x.unflatten(-1, (heads, problem.head_dim)).transpose(1, 2)

        query = _rotate(project("q", problem.heads), *self.rotary)
        key = _rotate(project("k", problem.kv_heads), *self.rotary)
        value = project("v", problem.kv_heads)
        repeat = problem.heads // problem.kv_heads
        attended = F.scaled_dot_product_attention(
            query,
            torch.cat([*keys, key], dim=2).repeat_interleave(repeat, 1),
            torch.cat([*values, value], dim=2).repeat_interleave(repeat, 1),
            attn_mask=mask,
        )
        attended = attended.transpose(1, 2).flatten(2)
        hidden = hidden + F.linear(attended, w[f"{layer}self_attn.o_proj.weight"])
        normed = _norm(hidden, w[f"{layer}post_attention_layernorm.weight"])
        gate = F.silu(F.linear(normed, w[f"{layer}mlp.gate_proj.weight"]))
        up = F.linear(normed, w[f"{layer}mlp.up_proj.weight"])
        hidden = hidden + F.linear(gate * up, w[f"{layer}mlp.down_proj.weight"])
        logits = F.linear(_norm(hidden, w["norm.weight"]), w["lm_head.weight"])
        return hidden, logits, key, value

    @staticmethod
    def _loss(teacher: Tensor, best: Tensor, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        log_q = logits.log_softmax(-1)
        loss = -(mask.unsqueeze(-1) * teacher * log_q).sum(-1).sum() / (mask.sum() + 1e-5)
        hits = (logits.argmax(-1) == best) & (mask > 0)
        return loss, hits.sum() / mask.sum().clamp(min=1)

    def _mask(self, step: int, device: str, dtype: torch.dtype) -> Tensor:
        """[S, S * (step + 1)]: the trunk, shifted with the hidden, and a diagonal per later step.

        Row p of step t holds the draft of row p - t; so it sees the trunk up to p - t.
        """
        length = self.problem.seq
        row = torch.arange(length, device=device).unsqueeze(1)
        column = torch.arange(length, device=device).unsqueeze(0)
        parts = [column <= row - step]
        parts += [column == row - (step - past) for past in range(1, step + 1)]
        seen = torch.cat(parts, dim=1)
        return torch.zeros(seen.shape, device=device, dtype=dtype).masked_fill(
            ~seen, torch.finfo(dtype).min
        )


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def _rotary(problem: Problem, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size = problem.head_dim
    inverse = 10000.0 ** (-torch.arange(0, size, 2, device=device).float() / size)
    angles = torch.arange(problem.seq, device=device).float().unsqueeze(1) * inverse
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-two, one], dim=-1) * sin
