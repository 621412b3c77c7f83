from __future__ import annotations

import importlib
import os
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_eagle.testing import RankError, harness, megatron_parallel, run_distributed


def _sum_of_ranks(rank: int, world_size: int, start: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = start + rank
    dist.all_reduce(total)
    return torch.get_num_threads(), total


def test_results_come_back_in_rank_order() -> None:
    results = run_distributed(_rank_and_size, 3)
    assert results == [(0, 3), (1, 3), (2, 3)]


def _rank_and_size(rank: int, world_size: int) -> tuple[int, int]:
    time.sleep(0.2 * (world_size - rank))
    return dist.get_rank(), dist.get_world_size()


def test_tensors_travel_both_ways_and_collectives_work() -> None:
    results = run_distributed(_sum_of_ranks, 2, torch.tensor([10.0, 20.0]))
    for threads, total in results:
        assert threads == 1
        assert total.tolist() == [21.0, 41.0]


def _rank_1_raises(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("the culprit")
    dist.barrier()


def test_the_failing_ranks_traceback_arrives_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 raised.*_rank_1_raises.*the culprit"):
        run_distributed(_rank_1_raises, 2, timeout=60)
    assert time.monotonic() - start < 30


def _rank_0_dies(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(3)
    dist.barrier()


def test_a_dead_rank_is_an_error() -> None:
    with pytest.raises(RankError):
        run_distributed(_rank_0_dies, 2, timeout=60)


def _rank_1_hangs(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600)


def test_a_hang_names_the_rank_and_the_line() -> None:
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[1\].*_rank_1_hangs"):
        run_distributed(_rank_1_hangs, 2, timeout=5)


def _group_sizes(rank: int, world_size: int, layout: dict[str, int]) -> dict[str, Any]:
    groups = megatron_parallel(**layout)
    return {name: getattr(groups, name).size() for name in ("tp", "pp", "cp", "ep", "dp")}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"tp": 2, "pp": 2}, {"tp": 2, "pp": 2, "cp": 1, "ep": 1, "dp": 1}),
        ({"cp": 2}, {"tp": 1, "pp": 1, "cp": 2, "ep": 1, "dp": 2}),
        ({"ep": 4}, {"tp": 1, "pp": 1, "cp": 1, "ep": 4, "dp": 4}),
    ],
)
def test_megatron_groups_have_the_asked_sizes(
    layout: dict[str, int], expected: dict[str, int]
) -> None:
    assert run_distributed(_group_sizes, 4, layout) == [expected] * 4


def test_the_example_in_the_docstring_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert harness.__doc__ is not None
    code = harness.__doc__.split("::\n", 1)[1].split("\nThe function must")[0]
    (tmp_path / "harness_example.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("harness_example").test_a_sum_over_two_ranks()
