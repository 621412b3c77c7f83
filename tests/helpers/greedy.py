"""Greedy decoding with a transformers model, a whole forward pass per token."""

from __future__ import annotations

import torch


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> list[int]:
    """Continue ``prompt`` by ``new_tokens`` tokens and return these."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
