"""The rotary embedding without copies equals Megatron's, forward and backward."""

from __future__ import annotations

import pytest
import torch

from megatron_eagle.compat import require
from megatron_eagle.platform.cpu.rotary import _ROTATE, _lean_rotary


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "mla"])
@pytest.mark.parametrize(("size", "rotated"), [(8, 8), (12, 8)])
@pytest.mark.parametrize("packed", [False, True], ids=["one-table", "per-sequence"])
def test_equals_megatrons(interleaved: bool, size: int, rotated: int, packed: bool) -> None:
    torch.manual_seed(size)
    original = require(_ROTATE)
    lean = _lean_rotary(original)
    both = torch.randn(5, 2, 3, 2 * size, requires_grad=True)  # queries and keys in one tensor
    angles = torch.randn(5, 2 if packed else 1, 1, rotated)
    options = {"mla_rotary_interleaved": interleaved, "mscale": 1.3}
    expected = original(both[..., size:], angles, **options)
    found = lean(both[..., size:], angles, **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert found.is_contiguous()
    weight = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), both)
    (gradient,) = torch.autograd.grad((found * weight).sum(), both)
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-6)


def test_neighboring_pairs_go_to_megatron() -> None:
    calls = []
    lean = _lean_rotary(lambda *args, **kwargs: calls.append(args) or args[0])
    x = torch.ones(1, 1, 1, 4)
    assert lean(x, x, rotary_interleaved=True) is x and len(calls) == 1
