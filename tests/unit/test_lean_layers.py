"""The lean norm and MLP equal plain autograd, and keep what their docstrings say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_eagle.layers import lean_layers
from megatron_eagle.layers.zero_centered_norm import ZeroCenteredNorm
from megatron_eagle.platform.cpu import products


def check(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((x * weight).sum(), inputs) for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("centered", [False, True])
def test_norm_equals_torch(centered: bool) -> None:
    torch.manual_seed(0)
    config = SimpleNamespace(sequence_parallel=True, layernorm_zero_centered_gamma=centered)
    norm = lean_layers.RMSNorm(config, 48, eps=1e-3)
    assert norm.weight.mean() == 1 - centered
    assert norm.weight.sequence_parallel is True
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 2, 48, requires_grad=True)
    expected = torch.nn.functional.rms_norm(x, (48,), norm.weight + centered, 1e-3)
    check(norm(x), expected, [x, norm.weight])
    if centered:
        torch.testing.assert_close(norm._fused(x), expected)


def test_weights_near_zero_keep_their_digits_in_half_precision() -> None:
    """As in transformers' Qwen3-Next: base and draft, without Transformer Engine."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

    torch.manual_seed(0)
    config = SimpleNamespace(
        sequence_parallel=False, layernorm_zero_centered_gamma=True, normalization="RMSNorm"
    )
    x, theirs = torch.randn(64, 48).bfloat16(), Qwen3NextRMSNorm(48, eps=1e-5).bfloat16()
    torch.nn.init.normal_(theirs.weight, std=0.01)
    expected = theirs(x)
    for kind in (ZeroCenteredNorm, lean_layers.RMSNorm):
        ours = kind(config, 48, eps=1e-5).bfloat16()
        ours.load_state_dict(theirs.state_dict())
        assert (ours(x) != expected).float().mean() < 0.01, kind  # the sum's order is another


def test_swiglu_equals_torch_and_keeps_its_input_only() -> None:
    torch.manual_seed(0)
    both = torch.randn(7, 2, 12, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        found = lean_layers._SwiGLU.apply(both)
    assert [x.data_ptr() for x in kept] == [both.data_ptr()]
    gate, up = both.chunk(2, dim=-1)
    check(found, torch.nn.functional.silu(gate) * up, [both])


@pytest.mark.parametrize("onednn", [False, True])
def test_products_equal_matmul(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels, wherever the tests run."""
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: onednn)
    monkeypatch.setattr(products, "_CACHED_BYTES", 4 * 10 * 6)  # several pieces
    torch.manual_seed(0)
    x, weight = torch.randn(3, 2, 6, requires_grad=True), torch.randn(33, 6, requires_grad=True)
    check(products.linear(x, weight), x @ weight.t(), [x, weight])
    left, right, total = torch.randn(8, 33), torch.randn(8, 6), torch.randn(33, 6)
    expected = total + left.t() @ right
    products.add_outer_(total, left, right)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
