"""The EAGLE oracle: plain PyTorch, one process, dense masks, full softmax, ordinary autograd.

Nothing here comes from the package under test or from Megatron. Parameters carry the names of the
Hugging Face files, so an exported checkpoint loads with no name table in between.
Shapes are batch-first: B batch, S sequence, H draft hidden, Ht base hidden, A captured layers,
V base vocabulary (no padding), D draft vocabulary, K test-time-training steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference.layers import KeyValue, ReferenceConfig, ReferenceLayer
from tests.reference.losses import row_loss

__all__ = ["ReferenceConfig", "ReferenceEagle3"]


def vocabulary_maps(config: ReferenceConfig, vocab_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """(d2t int64 [D], t2d bool [V]); no ids means that draft and base vocabulary are the same."""
    if vocab_ids is None:
        if config.draft_vocab_size != config.vocab_size:
            raise ValueError("a draft vocabulary smaller than the base's needs its ids")
        vocab_ids = torch.arange(config.vocab_size)
    if vocab_ids.shape != (config.draft_vocab_size,) or vocab_ids.dtype != torch.int64:
        raise ValueError(f"vocab_ids must be int64 [{config.draft_vocab_size}]")
    if not (vocab_ids.diff() > 0).all():
        raise ValueError("vocab_ids must ascend strictly")
    if vocab_ids[0] < 0 or vocab_ids[-1] >= config.vocab_size:
        raise ValueError(f"vocab_ids must lie in [0, {config.vocab_size})")
    t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
    t2d[vocab_ids] = True
    return vocab_ids - torch.arange(config.draft_vocab_size), t2d


def shift_left(x: Tensor, by: int) -> Tensor:
    """x[:, p + by] at row p [B, S, ...]; zeros past the end, where every row is invalid."""
    return torch.cat([x[:, by:], torch.zeros_like(x[:, :by])], dim=1)


class ReferenceEagle3(nn.Module):
    """The draft. `embed_weight` [V, H] is the base's, frozen; `vocab_ids` int64 [D] ascending.

    With `eagle1` the caller puts the base's output rows into `lm_head` and freezes it, and `aux` is
    the base's final hidden (num_aux 1).
    """

    d2t: Tensor
    t2d: Tensor
    embed_weight: Tensor

    def __init__(
        self, config: ReferenceConfig, embed_weight: Tensor, vocab_ids: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        inputs = config.num_aux * config.target_hidden_size + (size if config.eagle1 else 0)
        self.fc = nn.Linear(inputs, size, bias=False)
        if config.fc_norm:
            norms = [nn.RMSNorm(config.target_hidden_size, eps=config.rms_eps)
                     for _ in range(config.num_aux)]  # fmt: skip
            self.fc_norm = nn.ModuleList(norms)
        if config.mask_token is not None:  # P-EAGLE
            self.mask_hidden = nn.Parameter(torch.randn(1, inputs))
        if config.norm_before_fc:
            self.input_norm = nn.RMSNorm(inputs, eps=config.rms_eps)
        if config.num_layers == 1:
            self.midlayer = ReferenceLayer(config, first=True)
        else:
            self.layers = nn.ModuleList(
                ReferenceLayer(config, first=i == 0) for i in range(config.num_layers)
            )
        self.norm = nn.Identity() if config.eagle1 else nn.RMSNorm(size, eps=config.rms_eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        d2t, t2d = vocabulary_maps(config, vocab_ids)
        self.register_buffer("d2t", d2t)
        self.register_buffer("t2d", t2d)
        if embed_weight.shape != (config.vocab_size, size):
            raise ValueError(f"embed_weight {tuple(embed_weight.shape)} is not [V, H]")
        self.register_buffer("embed_weight", embed_weight.detach().clone(), persistent=False)

    @classmethod
    def from_hf(
        cls, directory: str | Path, embed_weight: Tensor, dtype: torch.dtype = torch.float32,
        **objective: Any,
    ) -> ReferenceEagle3:  # fmt: skip
        """Load config.json and model.safetensors; every tensor must be known and present."""
        from safetensors.torch import load_file  # benchmarks/gpu.py has the rest without it

        directory = Path(directory)
        config = ReferenceConfig.from_hf(directory / "config.json", **objective)
        tensors = load_file(directory / "model.safetensors")
        for i in range(1, config.num_layers):  # SGLang's second name for the same norm
            twin = tensors.pop(f"layers.{i}.hidden_norm.weight", None)
            if twin is not None and not twin.equal(tensors[f"layers.{i}.input_layernorm.weight"]):
                raise ValueError(f"layers.{i}: hidden_norm and input_layernorm differ")
        shipped = tensors.pop("embed_tokens.weight", None)
        if shipped is not None and not shipped.float().equal(embed_weight.to(shipped).float()):
            raise ValueError("embed_tokens.weight differs from the base's embedding")
        d2t = tensors.pop("d2t", None)
        t2d = tensors.pop("t2d", None)
        ids = None if d2t is None else torch.arange(config.draft_vocab_size) + d2t
        model = cls(config, embed_weight, ids)
        if t2d is not None and (t2d.dtype != torch.bool or not t2d.equal(model.t2d)):
            raise ValueError("t2d is not the bool image of d2t")
        model.load_state_dict({**tensors, "d2t": model.d2t, "t2d": model.t2d}, strict=True)
        return model.to(dtype)

    @property
    def vocab_ids(self) -> Tensor:
        """int64 [D]: the base token of each draft token."""
        return torch.arange(self.config.draft_vocab_size) + self.d2t

    def blocks(self) -> Iterable[nn.Module]:
        return [self.midlayer] if self.config.num_layers == 1 else self.layers

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embed_weight)

    def start(self, aux: Tensor) -> Tensor:
        """What step 0 reads of the base, [..., A*Ht] -> [..., H]."""
        if self.config.eagle1:
            return aux
        if self.config.fc_norm:
            parts = aux.chunk(self.config.num_aux, dim=-1)
            aux = torch.cat([n(part) for n, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        if self.config.norm_before_fc:
            aux = self.input_norm(aux)
        return self.fc(aux)

    def fed_back(self, output: Tensor) -> Tensor:
        """What the next step reads of a step's output."""
        return self.norm(output) if self.config.norm_output else output

    def step(self, hidden: Tensor, tokens: Tensor, past: list[list[KeyValue]]) -> Tensor:
        """One pass: hidden [B, S, H] and the consumed tokens [B, S] -> pre-norm output."""
        embedding = self.embed(tokens)
        if self.config.eagle1:
            hidden = self.fc(torch.cat([embedding, hidden], dim=-1))
        for block, layer_past in zip(self.blocks(), past, strict=True):
            hidden = block(hidden, embedding, layer_past)
        return hidden

    def forward_ttt(
        self, aux: Tensor, tokens: Tensor, base_logits: Tensor, loss_mask: Tensor
    ) -> dict[str, Tensor]:
        """aux [B,S,A*Ht], tokens [B,S], base_logits [B,S,V], loss_mask [B,S] -> see `objective`."""
        past: list[list[KeyValue]] = [[] for _ in range(self.config.num_layers)]
        hidden, logits, outputs = self.start(aux), [], []
        for t in range(self.config.ttt_steps):
            consumed = shift_left(tokens, t + 1)
            if self.config.mask_token is not None and t > 0:
                consumed = torch.full_like(tokens, self.config.mask_token)
                hidden = self.start(self.mask_hidden).expand_as(hidden)
            output = self.step(hidden, consumed, past)
            outputs.append(output)
            logits.append(self.lm_head(self.norm(output)))
            hidden = self.fed_back(output)
            if self.config.detach_steps:
                hidden = hidden.detach()
        result = self.objective(torch.stack(logits), base_logits, loss_mask)
        for block in self.blocks():
            if self.config.num_experts:  # a mean over the steps, beside the mean over rows
                balance = torch.stack(block.mlp.balances).mean()
                result["loss"] = result["loss"] + self.config.balance * balance
        return self.regress(result, outputs, aux) if self.config.eagle1 else result

    def regress(
        self, result: dict[str, Tensor], outputs: list[Tensor], final: Tensor
    ) -> dict[str, Tensor]:
        """`result` with EAGLE-1's loss on the hidden: step t of row p against the base's at p+1+t.
        Adds `regression_sums` [K]."""
        sums = []
        for t, output in enumerate(outputs):
            error = (output - shift_left(final, t + 1)).abs()
            smooth = torch.where(error < 1, error.square() / 2, error - 0.5).mean(-1)
            sums.append((smooth * result["valid_rows"][t]).sum())
        stacked = torch.stack(sums)
        weights = self.config.step_decay ** torch.arange(len(sums), dtype=stacked.dtype)
        share = (weights * stacked).sum() / result["counts"][0].clamp(min=1)
        loss = result["loss"] + self.config.regression * share
        return {**result, "loss": loss, "regression_sums": stacked}

    def objective(
        self, logits: Tensor, base_logits: Tensor, loss_mask: Tensor
    ) -> dict[str, Tensor]:
        """Score draft logits [K, B, S, D] against the base.

        Returns `loss` [], `loss_sums`, `counts`, `hits`, `prefixes` [K] (start rows that hit at
        steps 0..t), the masks `valid_rows` and `hit_rows` bool [K, B, S], and `logits` as given.
        Row p of step t consumes x[p+1+t]: it is valid iff that token exists and is supervised, i.e.
        p+1+t < S and loss_mask[p+t] == 1.
        """
        losses, valid_rows, hit_rows = [], [], []
        length = loss_mask.shape[1]
        for t, draft in enumerate(logits):
            base = shift_left(base_logits, t + 1)
            best = base.argmax(-1)  # the first of equals
            inside = torch.arange(length) + t + 1 < length
            valid = (shift_left(loss_mask, t) == 1) & inside
            if self.config.mask_out_of_vocab:
                valid = valid & self.t2d[best]
            name, decay = self.config.loss, self.config.lk_decay
            losses.append(row_loss(name, draft, base, self.vocab_ids, decay))
            valid_rows.append(valid)
            hit_rows.append(valid & (self.vocab_ids[draft.argmax(-1)] == best))
        loss, valid, hit = torch.stack(losses), torch.stack(valid_rows), torch.stack(hit_rows)
        loss_sums, counts = (loss * valid).sum((1, 2)), valid.sum((1, 2))
        weights = self.config.step_decay ** torch.arange(len(logits), dtype=loss_sums.dtype)
        return {
            "loss": (weights * loss_sums).sum() / counts[0].clamp(min=1),
            "loss_sums": loss_sums,
            "counts": counts,
            "hits": hit.sum((1, 2)),
            "prefixes": hit.long().cumprod(0).sum((1, 2)),
            "valid_rows": valid,
            "hit_rows": hit,
            "logits": logits,
        }
