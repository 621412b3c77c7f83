"""The draft's vocabulary: chosen from counts, or read from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_eagle.draft.vocab import choose_vocab_ids, load_vocab_ids


def test_special_tokens_come_first_then_the_most_frequent_then_the_lowest_unused() -> None:
    counts = torch.tensor([0, 0, 5, 0, 9, 0, 1, 0])
    assert choose_vocab_ids(counts, 3, always=[7]).tolist() == [2, 4, 7]
    assert choose_vocab_ids(counts, 6, always=[7]).tolist() == [0, 1, 2, 4, 6, 7]
    assert choose_vocab_ids(counts, 8, always=[]).tolist() == list(range(8))


def test_sizes_that_cannot_be_are_refused() -> None:
    counts = torch.ones(8, dtype=torch.int64)
    with pytest.raises(ValueError, match="draft_vocab_size 9 exceeds"):
        choose_vocab_ids(counts, 9, always=[])
    with pytest.raises(ValueError, match="cannot hold the 3 special and byte tokens"):
        choose_vocab_ids(counts, 2, always=[0, 1, 2])


def test_ids_and_offsets_read_alike(tmp_path: Path) -> None:
    ids = torch.tensor([1, 4, 6])
    save_file({"vocab_ids": ids}, tmp_path / "ids.safetensors")
    save_file({"d2t": ids - torch.arange(3)}, tmp_path / "d2t.safetensors")
    for name in ("ids", "d2t"):
        assert load_vocab_ids(str(tmp_path / f"{name}.safetensors"), 8, None).tolist() == [1, 4, 6]


@pytest.mark.parametrize(
    ("tensors", "size", "message"),
    [
        ({"vocab_ids": [1, 6, 4]}, None, "are not ascending"),
        ({"d2t": [1, -1, 0]}, None, "are not ascending"),
        ({"vocab_ids": [1, 4, 8]}, None, "the base has ids 0 to 7"),
        ({"vocab_ids": [1, 4]}, 3, "holds 2 ids, draft_vocab_size is 3"),
        ({"other": [1]}, None, "neither 'vocab_ids' nor 'd2t'"),
    ],
)
def test_bad_files_are_refused(
    tensors: dict, size: int | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "map.safetensors"
    save_file({name: torch.tensor(values) for name, values in tensors.items()}, file)
    with pytest.raises(ValueError, match=message) as raised:
        load_vocab_ids(str(file), 8, size)
    assert str(raised.value).startswith(f"vocab_map {file}")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "map.safetensors"
    save_file({"vocab_ids": torch.arange(8)}, file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_vocab_ids(str(file), 8, None)
    with pytest.raises(ValueError, match="no such file"):
        load_vocab_ids(str(tmp_path / "absent"), 8, None)
