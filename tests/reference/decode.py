"""Greedy drafting from scratch: the oracle of a server's chain, without any cache.

Served drafts see one growing causal sequence of (hidden, token) pairs. That is another layout than
training's rows and branches, so the two check each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.eagle3 import ReferenceEagle3


@torch.no_grad()
def draft_chain(
    model: ReferenceEagle3, tokens: Tensor, aux: Tensor, num_steps: int
) -> tuple[Tensor, Tensor]:
    """Draft `num_steps` tokens after a prefix of n + 1 tokens.

    tokens int64 [n + 1], the last just sampled by the base; aux [n, A*Ht], the base's captured
    hidden of all but that last. Returns base token ids int64 [num_steps] and logits [num_steps, D].
    """
    if tokens.dim() != 1 or len(tokens) < 2 or len(aux) != len(tokens) - 1:
        raise ValueError(f"tokens {tuple(tokens.shape)} and aux {tuple(aux.shape)}: want n + 1, n")
    hidden = model.start(aux)[None]
    consumed = tokens[1:]
    ids, logits = [], []
    if model.config.mask_token is not None:  # all in one pass, mask rows behind the prefix
        masks = model.start(model.mask_hidden).expand(num_steps - 1, -1)[None]
        hidden = torch.cat([hidden, masks], dim=1)
        consumed = torch.cat([consumed, torch.full((num_steps - 1,), model.config.mask_token)])
        output = model.step(hidden, consumed[None], [[] for _ in model.blocks()])
        logits_ = model.lm_head(model.norm(output))[0, -num_steps:]
        return model.vocab_ids[logits_.argmax(-1)], logits_
    for _ in range(num_steps):
        output = model.step(hidden, consumed[None], [[] for _ in model.blocks()])[:, -1:]
        logits.append(model.lm_head(model.norm(output))[0, 0])
        ids.append(model.vocab_ids[logits[-1].argmax()])
        hidden = torch.cat([hidden, model.fed_back(output)], dim=1)
        consumed = torch.cat([consumed, ids[-1][None]])
    return torch.stack(ids), torch.stack(logits)
