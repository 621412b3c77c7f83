"""--eagle-compile: regions really are compiled, agree with eager, and survive a failure."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_eagle.parallel import soft_cross_entropy
from megatron_eagle.platform.compiler import compilable, compile_regions


@pytest.fixture(autouse=True)
def eager_afterwards() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    compile_regions(False)


def arguments(rows: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows)
    matrix, vector = (rows, 9), (rows,)
    return (
        torch.randn(matrix), torch.randn(vector), torch.rand(matrix),
        torch.rand(vector), torch.rand(vector),
    )  # fmt: skip


def test_compiled_gradient_equals_eager_without_recompiling() -> None:
    expected = [soft_cross_entropy._logit_gradient(*arguments(rows)) for rows in (5, 8, 13)]
    assert counters["frames"]["total"] == 0
    compile_regions()
    for rows, eager in zip((5, 8, 13), expected, strict=True):
        found = soft_cross_entropy._logit_gradient(*arguments(rows))
        torch.testing.assert_close(found, eager, rtol=1e-6, atol=1e-6)
    assert counters["frames"]["ok"] == 1, "compiled once, for every number of rows"


def test_a_failing_compilation_is_said_once_and_runs_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken_compile(function: object, **options: object) -> object:
        def call(*args: object) -> None:
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken_compile)

    @compilable
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    compile_regions()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert double(torch.ones(2)).tolist() == [2.0, 2.0]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "double" in messages[0] and "no C++ compiler" in messages[0]
