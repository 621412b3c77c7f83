"""Triton kernels in Triton's interpreter equal the eager functions that they stand in for.

The interpreter must be chosen before Triton is first imported, so the checks run in one process of
their own.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eagle.attention import branch as eager_branch
from megatron_eagle.errors import UserError
from megatron_eagle.kernels import choice
from megatron_eagle.kernels.choice import choose_kernels, with_kernel
from megatron_eagle.loss import acceptance, reduction, reverse_kl, shard_softmax

pytestmark = pytest.mark.skipif(not choice.triton_is_installed(), reason="no Triton")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Executor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as executor:
            yield executor


def both(function: Callable[..., Any], *args: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Run kernel and eager function; return results and changed arguments of each as fp32."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    found = []
    for name in ("triton", "eager"):
        choose_kernels(name)
        own = [_copy(arg) for arg in args]
        result = function(*own)
        found.append([x.float() for x in _tensors([own, result])])
    choose_kernels("auto")
    return found[0], found[1]


def _copy(arg: Any) -> Any:
    """Copy tensors, with their strides."""
    if isinstance(arg, list):
        return [_copy(x) for x in arg]
    if not isinstance(arg, Tensor):
        return arg
    return torch.empty_like(arg).copy_(arg)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in _tensors(part)] if isinstance(value, list | tuple) else []


def check(
    interpreter: Executor, function: Callable[..., Any], dtype: torch.dtype, *args: Any
) -> None:
    found, expected = interpreter.submit(both, function, *args).result(timeout=240)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def softmaxes(columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draft logits of 2 steps and 3 positions, and a teacher."""
    torch.manual_seed(columns)
    draft, teacher = 3 * torch.randn(2, 3, columns), torch.randn(3, columns).softmax(-1)
    return draft.to(dtype), teacher


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
COLUMNS = pytest.mark.parametrize("columns", [1, 37, 8192 + 5])


@DTYPES
@COLUMNS
@pytest.mark.parametrize("subtract", [True, False])
def test_softmax_and_statistics(
    interpreter: Executor, columns: int, dtype: torch.dtype, subtract: bool
) -> None:
    logits, teacher = softmaxes(columns, dtype)
    logits[0, 1] = 1.0  # all equal: the first is the maximum
    check(interpreter, shard_softmax._by_blocks, dtype, logits, teacher, subtract)
    if not subtract:
        check(interpreter, shard_softmax._by_blocks, dtype, logits, None, False)


@DTYPES
@COLUMNS
def test_the_gradient_of_a_kept_softmax(
    interpreter: Executor, columns: int, dtype: torch.dtype
) -> None:
    draft, teacher = softmaxes(columns, dtype)
    mass, teacher_mass = torch.rand(2, 3), torch.rand(3)
    mass[1, 2] = 0.0  # another shard has everything
    kept = draft.float().softmax(-1).to(dtype)
    check(interpreter, shard_softmax.rescale_, dtype, kept, mass, teacher, teacher_mass)


@DTYPES
@COLUMNS
def test_the_passes_of_an_acceptance_loss(
    interpreter: Executor, columns: int, dtype: torch.dtype
) -> None:
    draft, teacher = softmaxes(columns, dtype)
    masses = torch.rand(2, 3), torch.rand(3), torch.rand(3)
    kept = draft.float().softmax(-1).to(dtype)
    check(interpreter, reduction._overlap, dtype, kept, teacher, *masses)
    factors = (torch.rand(2, 3) for _ in range(3))
    check(interpreter, acceptance._gradient_, dtype, kept, teacher, *masses, *factors)


@DTYPES
@COLUMNS
def test_the_passes_of_the_reverse_divergence(
    interpreter: Executor, columns: int, dtype: torch.dtype
) -> None:
    draft, teacher = softmaxes(columns, dtype)
    kept = draft.float().softmax(-1).to(dtype)
    kept[0, 0, 0] = teacher[1, 0] = 0.0  # their logarithms are cut
    check(interpreter, reverse_kl._divergence, dtype, kept, teacher)
    mass, offset = torch.rand(2, 3), torch.randn(2, 3)
    check(interpreter, reverse_kl._gradient_, dtype, kept, teacher, mass, offset)


@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 3, 0)])
def test_no_position_or_an_empty_shard(interpreter: Executor, shape: tuple[int, int, int]) -> None:
    draft, teacher = torch.zeros(shape), torch.zeros(shape[1:])
    masses = torch.rand(shape[:2]), torch.rand(shape[1]), torch.rand(shape[1])
    check(interpreter, shard_softmax._softmax_, torch.float32, draft, teacher, True)
    check(interpreter, shard_softmax.rescale_, torch.float32, draft, masses[0], teacher, masses[1])
    check(interpreter, reduction._overlap, torch.float32, draft, teacher, *masses)
    check(interpreter, reverse_kl._divergence, torch.float32, draft, teacher)
    check(interpreter, reverse_kl._gradient_, torch.float32, draft, teacher, masses[0], masses[0])


@DTYPES
@pytest.mark.parametrize(
    ("heads", "groups", "size", "value_size", "steps"),
    [(4, 2, 16, 16, 1), (4, 1, 24, 24, 3), (2, 2, 12, 6, 2)],
    ids=["gqa", "one-group", "mla"],
)
def test_branch_attention(
    interpreter: Executor,
    dtype: torch.dtype,
    heads: int,
    groups: int,
    size: int,
    value_size: int,
    steps: int,
) -> None:
    torch.manual_seed(steps)
    rows, batch = 37, 2

    def rand(count: int, width: int) -> Tensor:
        """Positions before heads in memory, as the layers make them."""
        return torch.randn(rows, batch, count, width).to(dtype).permute(1, 2, 0, 3)

    q, out, lse = rand(heads, size), rand(heads, value_size), torch.randn(batch, heads, rows)
    keys = [rand(groups, size) for _ in range(steps)]
    values = [rand(groups, value_size) for _ in range(steps)]
    check(interpreter, eager_branch.merge_branch_, dtype, q, out, lse, keys, values, 0.2)
    lse = lse + 3.0  # of a softmax that holds the branch
    dq, grad_out = torch.randn(q.shape).to(dtype), rand(heads, value_size)
    arguments = (grad_out, q, out, lse, keys, values, 0.2, dq)
    check(interpreter, eager_branch.branch_backward, dtype, *arguments)


def test_a_kernel_that_cannot_be_launched_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    @with_kernel("megatron_eagle.kernels.choice:no_such_launcher")
    def double(x: Tensor) -> Tensor:
        return 2 * x

    with (
        pytest.MonkeyPatch.context() as patch,
        caplog.at_level(logging.WARNING, "megatron_eagle"),
    ):
        patch.setattr(choice, "runs_kernel", lambda x: True)
        for _ in range(3):
            assert double(torch.ones(2)).tolist() == [2.0, 2.0]
        patch.setitem(choice._state, "choice", "triton")
        patch.setitem(choice._state, "failed", set())
        with pytest.raises(AttributeError):
            double(torch.ones(2))
    choose_kernels("auto")
    (message,) = [record.getMessage() for record in caplog.records]
    assert "no_such_launcher" in message


def test_triton_is_refused_where_it_is_not_installed() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "triton_is_installed", lambda: False)
        with pytest.raises(UserError, match="kernels triton: Triton is not installed"):
            choose_kernels("triton")
        choose_kernels("auto")
        assert not choice.runs_kernel(torch.ones(1))
