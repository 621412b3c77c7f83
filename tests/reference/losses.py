"""The oracle's losses of a draft row against the base's, on whole rows, by ordinary autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(draft_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """-sum p log q over the last axis, in fp32 or, for fp64 inputs, in fp64."""
    if draft_logits.dtype != torch.float64:
        draft_logits, teacher_logits = draft_logits.float(), teacher_logits.float()
    teacher = torch.softmax(teacher_logits, dim=-1)
    return -(teacher * torch.log_softmax(draft_logits, dim=-1)).sum(-1)


def row_loss(
    name: str, draft_logits: Tensor, base_logits: Tensor, vocab_ids: Tensor, decay: float
) -> Tensor:
    """Loss `name` of draft_logits [..., D] against base_logits [..., V], [...]."""
    inside = base_logits[..., vocab_ids]
    if name == "kl":
        return soft_cross_entropy(draft_logits, inside)
    if name == "ce":
        flat = F.cross_entropy(
            draft_logits.flatten(0, -2), inside.argmax(-1).flatten(), reduction="none"
        )
        return flat.view(draft_logits.shape[:-1])
    if name == "reverse-kl":
        log_q, log_p = draft_logits.log_softmax(-1), inside.log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    alpha = acceptance(draft_logits, base_logits, vocab_ids)
    if name == "tv":
        return 1 - alpha
    if name == "lk-alpha":
        return -alpha.log()
    assert name == "lk-lambda"
    weight = torch.exp(-decay * alpha.detach())
    return weight * soft_cross_entropy(draft_logits, inside) + (1 - weight) * (1 - alpha)


def acceptance(draft_logits: Tensor, base_logits: Tensor, vocab_ids: Tensor) -> Tensor:
    """What a verifier accepts of a sampled draft: sum min(p, q), p over the whole vocabulary."""
    p = base_logits.softmax(-1)[..., vocab_ids]
    return torch.minimum(draft_logits.softmax(-1), p).sum(-1)
