"""One product split into queries of some rows and keys and values of all equals the whole one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eagle.draft.live_queries import _Split, _SplitProduct

ROWS, CHANNELS, GROUPS, PER_GROUP, SIZE = 9, 6, 2, 3, 4
CHOSEN = torch.tensor([7, 1, 2])


def split(adds: bool) -> _Split:
    group: Any = None
    return _Split(CHOSEN, GROUPS, SIZE, group, sequence_parallel=False, adds_to_main_grad=adds)


def factors() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(GROUPS * (PER_GROUP + 2) * SIZE, CHANNELS, requires_grad=True)
    return torch.randn(ROWS, CHANNELS, requires_grad=True), weight


def whole_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As Megatron does: group by group, query heads, a key and a value."""
    made = torch.nn.functional.linear(x, weight).view(ROWS, GROUPS, -1)
    query, both = made.split([PER_GROUP * SIZE, 2 * SIZE], dim=-1)
    return query[CHOSEN].flatten(1), both.flatten(1)


@pytest.mark.parametrize("adds", [False, True])
def test_values_and_gradients_are_the_whole_products(adds: bool) -> None:
    x, weight = factors()
    expected = whole_product(x, weight)
    weights = [torch.randn_like(part) for part in expected]

    def gradients(parts: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        loss = sum((part * w).sum() for part, w in zip(parts, weights, strict=True))
        return torch.autograd.grad(loss, (x, weight))

    grad_x, grad_weight = gradients(expected)
    buffer = torch.ones_like(weight)
    weight.main_grad, weight.grad_added_to_main_grad = buffer, False  # type: ignore[attr-defined]
    found = _SplitProduct.apply(x, weight, split(adds))
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part, other)
    found_x, found_weight = gradients(found)
    torch.testing.assert_close(found_x, grad_x)
    torch.testing.assert_close(buffer - 1 if adds else found_weight, grad_weight)
    assert weight.grad_added_to_main_grad is adds  # type: ignore[attr-defined]
    if not adds:
        assert torch.equal(buffer, torch.ones_like(buffer))
