"""A trainer's packed sequences, told in either of Megatron's two ways, are the same batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eagle.attached.micro_batch import read_micro_batch
from megatron_eagle.errors import UserError

LENGTHS = (5, 9, 4)
TOKENS = torch.arange(20).unsqueeze(0)
MASK = (torch.arange(20) % 3 > 0).float().unsqueeze(0)


def captured(**fields: Any) -> Any:
    given = {"tokens": TOKENS, "position_ids": None, "packed_seq_params": None}
    return SimpleNamespace(**{**given, "other_inputs": False, **fields})


def group(size: int = 1) -> Any:
    return SimpleNamespace(size=lambda: size, rank=lambda: 0)


def packed(bounds: list[int], padded: list[int] | None = None) -> Any:
    def lengths(values: list[int] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.int32)

    return SimpleNamespace(cu_seqlens_q=lengths(bounds), cu_seqlens_q_padded=lengths(padded))


def restarting() -> Tensor:
    """Three documents, then two tokens of padding."""
    parts = [torch.arange(length) for length in (*LENGTHS, 2)]
    return torch.cat(parts).unsqueeze(0)


@pytest.mark.parametrize(
    "fields",
    [
        {"position_ids": restarting()},
        {"packed_seq_params": packed([0, 5, 14, 18])},
        {"packed_seq_params": packed([0, 4, 12, 16], [0, 5, 14, 18])},
        {"packed_seq_params": packed([0, 5, 14, 18, 18, 20])},
    ],
    ids=["restarting positions", "bounds", "padded documents", "repeated bounds"],
)
def test_documents(fields: dict[str, Any]) -> None:
    batch = read_micro_batch(captured(**fields), MASK, 2, group())
    assert batch.packing is not None
    assert batch.packing.documents == (((0, 5), (5, 14), (14, 18), (18, 20)),)
    assert batch.packing.positions.equal(restarting())
    # A target is a supervised token that does not begin a document; see EagleBatch.
    wanted = [u for u in range(1, 20) if MASK[0, u - 1] and u not in (5, 14, 18)]
    assert batch.target_rows.tolist() == wanted
    assert batch.step_mask[1].tolist() == [u not in (6, 15, 19) and u > 1 for u in wanted]


@pytest.mark.parametrize(
    "fields", [{}, {"position_ids": torch.arange(20).unsqueeze(0)}, {"position_ids": TOKENS + 3}]
)
def test_one_document(fields: dict[str, Any]) -> None:
    batch = read_micro_batch(captured(**fields), MASK, 2, group())
    assert batch.packing is None
    assert batch.target_rows.tolist() == [u for u in range(1, 20) if MASK[0, u - 1]]


def test_packed_sequences_under_context_parallelism() -> None:
    with pytest.raises(UserError, match="context_parallel_size 2 with packed_seq_params"):
        read_micro_batch(captured(packed_seq_params=packed([0, 5, 20])), MASK, 2, group(2))
