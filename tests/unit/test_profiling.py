"""NVTX ranges: pushed and popped when they are switched on, nothing otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_eagle.compat import configure_nvtx_profiling, nvtx_range_push
from megatron_eagle.platform.profiling import nvtx_range


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What reaches the device's NVTX functions."""
    made: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", made.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: made.append("pop"))
    yield made
    configure_nvtx_profiling(False)


def test_ranges_are_marked_only_when_switched_on(calls: list[str]) -> None:
    with nvtx_range("loss"):
        pass
    assert calls == []
    configure_nvtx_profiling(True)
    with nvtx_range("step"), nvtx_range("loss"):
        pass
    assert calls == ["eagle.step", "eagle.loss", "pop", "pop"]


def test_an_exception_closes_its_ranges_and_stays_what_it_was(calls: list[str]) -> None:
    """Megatron opens ranges of its own inside and does not close them when its code raises."""
    configure_nvtx_profiling(True)
    with pytest.raises(ValueError, match="out of memory"), nvtx_range("step"), nvtx_range("base"):
        nvtx_range_push("TransformerLayer.self_attention")
        nvtx_range_push("TransformerLayer.mlp")
        raise ValueError("out of memory")
    assert calls.count("pop") == 4 == len(calls) - 4
    with nvtx_range("step"):
        pass
    assert calls[-2:] == ["eagle.step", "pop"]
