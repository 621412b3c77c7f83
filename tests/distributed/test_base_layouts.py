"""Windows, sinks and MLA in the frozen base: cut over context-parallel ranks, packed or not."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import load_base_json
from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.tiny_hf import SIZES, make_base

STARTS = [[0, 9, 13, 24], [0, 2, 3, 17, 24]]


@pytest.mark.parametrize("family", ["mistral", "gpt_oss", "deepseek_v3"])
def test_packed_documents_are_computed_as_if_alone(family: str, tmp_path: Path) -> None:
    make_base(tmp_path / "hf", family)
    import_base(tmp_path / "hf", tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(SIZES["vocab_size"], (2, 24), generator=generator)
    base = str(tmp_path / "base")
    documents = [(row, *span) for row, starts in enumerate(STARTS) for span in pairwise(starts)]
    alone = [(tokens[row : row + 1, a:b], None) for row, a, b in documents]
    calls = [(tokens, None), (tokens, STARTS)]
    ((whole, packed, *expected),) = run_distributed(outputs, 1, base, calls + alone)
    for cut in run_distributed(outputs, 2, base, calls):
        close(cut, [whole, packed])
    close([packed[a:b, row] for row, a, b in documents], [hidden[:, 0] for hidden in expected])


def outputs(rank: int, world: int, base: str, calls: list[tuple[Tensor, Any]]) -> list[Tensor]:
    """The base's final hidden [S, B, H] of (tokens, documents' starts), put together over
    ``world`` context-parallel ranks."""
    groups = megatron_parallel(cp=world)
    from megatron_eagle.attention.packing import Packing
    from megatron_eagle.layers.backend import local_backend
    from megatron_eagle.parallel.context import ContextShard
    from megatron_eagle.teacher.base import FrozenBase
    from megatron_eagle.teacher.build import base_config, build_base, load_base

    info = load_base_json(base)
    config = base_config(info, 1, context_parallel_size=world)
    gpt = build_base(config, info, local_backend(), groups)
    load_base(gpt, base)
    frozen = FrozenBase(gpt, [0], info.vocab_size)
    found = []
    for tokens, starts in calls:
        packing = None if starts is None else Packing.of(positions_of(starts))
        final = frozen(tokens, packing).final_hidden
        parts = [torch.empty_like(final) for _ in range(world)]
        torch.distributed.all_gather(parts, final.contiguous(), group=groups.cp)
        whole = torch.empty(tokens.shape[1], *final.shape[1:])
        for cut, part in enumerate(parts):
            spans = ContextShard(tokens.shape[1], cut, world).spans
            whole[torch.cat([torch.arange(*span) for span in spans])] = part
        found.append(whole)
    return found


def positions_of(starts: list[list[int]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(b - a) for a, b in pairwise(s)]) for s in starts])


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
