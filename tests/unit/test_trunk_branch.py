"""Trunk + branch attention: output and every gradient equal one dense masked softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_eagle.attention import flash
from megatron_eagle.attention.trunk_branch import trunk_branch_attention

BATCH, LENGTH, SIZE, SCALE = 2, 19, 16, 0.21


def dense(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """All keys side by side under one mask: causal for the trunk, diagonal for each branch."""
    repeat = q.shape[1] // keys[0].shape[1]
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = torch.cat([causal, *[torch.eye(LENGTH, dtype=torch.bool)] * (len(keys) - 1)], dim=1)
    key = torch.cat(keys, dim=2).repeat_interleave(repeat, 1)
    value = torch.cat(values, dim=2).repeat_interleave(repeat, 1)
    scores = (q @ key.transpose(-1, -2) * SCALE).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("branches", [0, 1, 4])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_equals_dense_softmax(heads: int, groups: int, branches: int) -> None:
    torch.manual_seed(branches)
    q = torch.randn(BATCH, heads, LENGTH, SIZE, requires_grad=True)
    keys, values = (
        [torch.randn(BATCH, groups, LENGTH, SIZE, requires_grad=True) for _ in range(branches + 1)]
        for _ in range(2)
    )
    inputs = [q, *keys, *values]
    out = trunk_branch_attention(q, keys[0], values[0], keys[1:], values[1:], SCALE)
    expected = dense(q, keys, values)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), inputs)
    for a, b in zip(found, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_saved_memory_is_linear_in_the_length() -> None:
    """What one step saves for backward grows with S, not with S squared."""

    def saved_bytes(length: int) -> int:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        make = [torch.randn(1, 2, length, SIZE, requires_grad=True) for _ in range(5)]
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            trunk_branch_attention(make[0], make[1], make[2], [make[3]], [make[4]], SCALE)
        return total

    assert saved_bytes(512) == 4 * saved_bytes(128)


def test_dense_fallback_for_devices_without_flash_agrees() -> None:
    """The path that an fp32 GPU takes, run here on the CPU."""
    torch.manual_seed(0)
    q, grad = (torch.randn(BATCH, 4, LENGTH, SIZE) for _ in range(2))
    k, v = (torch.randn(BATCH, 2, LENGTH, SIZE) for _ in range(2))
    out, lse = flash.forward(q, k, v, SCALE, True)
    found_out, found_lse = flash._dense_forward(q, k, v, SCALE, True)
    torch.testing.assert_close(found_out, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_lse, lse, rtol=1e-5, atol=1e-5)
    expected = flash.backward(grad, q, k, v, out, lse, SCALE, True)
    found = flash._dense_backward(grad, q, k, v, out, lse, SCALE, True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
