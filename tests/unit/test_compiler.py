"""--eagle-compile: regions really are compiled, agree with eager, and survive a failure."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from megatron_eagle.loss.shard_softmax import draft_softmax_
from megatron_eagle.platform.compiler import compilable, compile_regions


@pytest.fixture(autouse=True)
def eager_afterwards() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    compile_regions(False)


def softmaxes(rows: int) -> tuple[Tensor, Tensor]:
    """Logits of three steps that became gradients, and their statistics."""
    torch.manual_seed(rows)
    logits, teacher = torch.randn(3, rows, 300), torch.rand(rows, 300).softmax(-1)
    statistics = draft_softmax_(logits, teacher, subtract=True)
    return logits, statistics


@pytest.mark.slow
def test_compiled_softmax_equals_eager_without_recompiling() -> None:
    """One compilation serves every step and every number of rows."""
    expected = [softmaxes(rows) for rows in (5, 8, 13)]
    assert counters["frames"]["total"] == 0
    compile_regions()
    for rows, eager in zip((5, 8, 13), expected, strict=True):
        torch.testing.assert_close(softmaxes(rows), eager, rtol=1e-5, atol=1e-6)
    assert counters["frames"]["ok"] == 1


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
