"""Reading torch_dist checkpoints: whole tensors from shards, one clear error for each damage."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.checkpoint.safe_unpickler import ForbiddenClassError, MetadataUnpickler
from megatron_eagle.checkpoint.writer import Chunk
from tests.helpers.trained_draft import chunked, save_iteration

TENSORS = {
    "draft.a": torch.randn(7, 3),
    "draft.b": torch.arange(5),
    "draft.c": torch.randn(4, 2, dtype=torch.bfloat16),
}


def edit_metadata(directory: Path, change: Any) -> None:
    content = pickle.loads((directory / ".metadata").read_bytes())
    change(content)
    (directory / ".metadata").write_bytes(pickle.dumps(content))


def open_error(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        CheckpointReader.open(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def load_error(path: Path, key: str = "draft.a") -> str:
    checkpoint = CheckpointReader.open(path)
    with pytest.raises(ValueError) as error:
        checkpoint.load([key])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("parts", [1, 3])
def test_whole_tensors_are_read_from_a_directory_or_an_iteration(
    tmp_path: Path, parts: int
) -> None:
    directory = save_iteration(tmp_path, chunked(TENSORS, parts))
    for path in (tmp_path, directory):
        checkpoint = CheckpointReader.open(path)
        assert checkpoint.directory == directory
        assert checkpoint.keys() == ["draft.a", "draft.b", "draft.c"]
        assert checkpoint.shape("draft.a") == (7, 3)
        found = checkpoint.load(checkpoint.keys())
        for key, tensor in TENSORS.items():
            assert found[key].dtype == tensor.dtype and found[key].equal(tensor)


def test_chunks_cut_along_columns_are_put_together(tmp_path: Path) -> None:
    whole = TENSORS["draft.a"]
    place = ("draft.a", (7, 3))
    chunks = [
        Chunk(*place, (0, 0), (7, 1), torch.float32, lambda: whole[:, :1]),
        Chunk(*place, (0, 1), (7, 2), torch.float32, lambda: whole[:, 1:]),
    ]
    directory = save_iteration(tmp_path, chunks)
    assert CheckpointReader.open(directory).load(["draft.a"])["draft.a"].equal(TENSORS["draft.a"])


def test_a_checkpoint_of_torch_dcp_itself_is_read(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(dict(TENSORS), checkpoint_id=tmp_path, no_dist=True)
    assert "metadata.json: missing" in open_error(tmp_path)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert CheckpointReader.open(tmp_path).load(["draft.b"])["draft.b"].equal(TENSORS["draft.b"])


def test_the_latest_iteration_is_taken(tmp_path: Path) -> None:
    save_iteration(tmp_path, chunked({"draft.b": torch.zeros(2)}), 10)
    save_iteration(tmp_path, chunked({"draft.b": torch.ones(2)}), 20)
    assert CheckpointReader.open(tmp_path).load(["draft.b"])["draft.b"].tolist() == [1, 1]
    found = CheckpointReader.open(tmp_path / "iter_0000010").load(["draft.b"])
    assert found["draft.b"].tolist() == [0, 0]


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert open_error(missing) == f"{missing}: no such checkpoint directory"
    assert open_error(tmp_path / "iter_0000001").endswith("no such checkpoint directory")
    assert "latest_checkpointed_iteration.txt is missing" in open_error(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("soon")
    assert "'soon'" in open_error(tmp_path)


def test_an_unfinished_or_foreign_save_is_refused(tmp_path: Path) -> None:
    directory = save_iteration(tmp_path, chunked(TENSORS))
    (directory / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "sharded_backend 'zarr'" in open_error(tmp_path)
    (directory / "metadata.json").write_text("[]")
    assert "not Megatron's description" in open_error(tmp_path)
    (directory / ".metadata").unlink()
    for path in (tmp_path, directory):
        assert ".metadata is missing" in open_error(path)


def test_deleted_and_truncated_shards_are_refused(tmp_path: Path) -> None:
    directory = save_iteration(tmp_path, chunked(TENSORS))
    (shard,) = directory.glob("*.distcp")
    size = shard.stat().st_size
    for kept in (size - 1, 0):
        os.truncate(shard, kept)
        checkpoint = CheckpointReader.open(tmp_path)
        with pytest.raises(ValueError) as error:
            checkpoint.load(TENSORS)
        expected = f"{shard}: shard file is truncated: {kept} bytes, {size} expected"
        assert str(error.value) == expected
    shard.unlink()
    assert load_error(tmp_path) == f"{shard}: shard file is missing (it holds draft.a)"


def test_an_overwritten_shard_is_refused(tmp_path: Path) -> None:
    directory = save_iteration(tmp_path, chunked(TENSORS))
    (shard,) = directory.glob("*.distcp")
    shard.write_bytes(os.urandom(shard.stat().st_size))
    assert load_error(tmp_path) == f"{shard}: corrupted shard: draft.a cannot be decoded"


def test_the_payload_of_another_tensor_is_refused(tmp_path: Path) -> None:
    directory = save_iteration(tmp_path, chunked(TENSORS))

    def swap(content: Any) -> None:
        places = {index.fqn: index for index in content.storage_data}
        a, b = places["draft.a"], places["draft.c"]
        content.storage_data[a].offset = content.storage_data[b].offset
        content.storage_data[a].length = content.storage_data[b].length

    edit_metadata(directory, swap)
    assert "corrupted shard: draft.a is not a torch.float32 tensor" in load_error(tmp_path)


def test_missing_and_overlapping_chunks_are_refused(tmp_path: Path) -> None:
    chunks = chunked(TENSORS, 3)
    first, *others = [chunk for chunk in chunks if chunk.key == "draft.a"]
    save_iteration(tmp_path / "missing", others)
    text = load_error(tmp_path / "missing")
    assert text.endswith("incomplete checkpoint: draft.a: chunks hold 12 of 21 elements")

    directory = save_iteration(tmp_path / "overlap", [first, *others])

    def grow(content: Any) -> None:
        content.state_dict_metadata["draft.a"].chunks[0].sizes = torch.Size((4, 3))

    edit_metadata(directory, grow)
    assert "chunks overlap" in load_error(tmp_path / "overlap")

    def leave(content: Any) -> None:
        content.state_dict_metadata["draft.a"].size = torch.Size((5, 3))

    edit_metadata(directory, leave)
    assert "leaves the shape (5, 3)" in load_error(tmp_path / "overlap")


def test_a_chunk_without_a_place_in_any_file_is_refused(tmp_path: Path) -> None:
    directory = save_iteration(tmp_path, chunked(TENSORS, 3))

    def forget(content: Any) -> None:
        index = next(i for i in content.storage_data if i.fqn == "draft.b")
        del content.storage_data[index]

    edit_metadata(directory, forget)
    assert "draft.b: chunks hold 3 of 5 elements" in load_error(tmp_path, "draft.b")
    assert CheckpointReader.open(tmp_path).load(["draft.a"])["draft.a"].equal(TENSORS["draft.a"])


def test_corrupted_metadata_are_refused(tmp_path: Path) -> None:
    directory = save_iteration(tmp_path, chunked(TENSORS))
    path = directory / ".metadata"
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"not a pickle", pickle.dumps([1])):
        path.write_bytes(damaged)
        assert open_error(tmp_path).startswith(f"{path}: corrupted checkpoint metadata (")


def test_absurd_sizes_are_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    directory = save_iteration(tmp_path, chunked(TENSORS))

    def inflate(content: Any) -> None:
        stored = content.state_dict_metadata["draft.a"]
        stored.size = stored.chunks[0].sizes = torch.Size((1 << 40, 1 << 10))

    edit_metadata(directory, inflate)
    assert "cannot lie in" in load_error(tmp_path)


def test_shards_outside_the_checkpoint_are_refused(tmp_path: Path) -> None:
    directory = save_iteration(tmp_path, chunked(TENSORS))

    def escape(content: Any) -> None:
        for info in content.storage_data.values():
            info.relative_path = f"../{directory.name}/{info.relative_path}"

    edit_metadata(directory, escape)
    assert "is not a file name" in open_error(tmp_path)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_in_the_metadata_is_executed(tmp_path: Path) -> None:
    directory = save_iteration(tmp_path, chunked(TENSORS))
    trap = tmp_path / "trap"
    (directory / ".metadata").write_bytes(pickle.dumps(Bomb(trap)))
    text = open_error(tmp_path)
    refused = f"refusing to unpickle {os.mkdir.__module__}.mkdir"
    assert text.startswith(f"{directory / '.metadata'}: {refused}: not a class")
    assert not trap.exists()


def test_nothing_in_a_shard_is_executed(tmp_path: Path) -> None:
    directory = save_iteration(tmp_path, chunked(TENSORS))
    trap = tmp_path / "trap"
    payload = tmp_path / "payload"
    torch.save(Bomb(trap), payload)
    (shard,) = directory.glob("*.distcp")
    shard.write_bytes(payload.read_bytes())

    def point(content: Any) -> None:
        for info in content.storage_data.values():
            info.offset, info.length = 0, shard.stat().st_size

    edit_metadata(directory, point)
    assert "cannot be decoded" in load_error(tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["_load_global_deps", "load", "Tensor"])
def test_torch_is_not_allowed_wholesale(name: str) -> None:
    with pytest.raises(ForbiddenClassError, match=f"torch.{name}"):
        MetadataUnpickler(io.BytesIO()).find_class("torch", name)


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    save_iteration(tmp_path, chunked(TENSORS))
    assert "no tensor 'draft.z' in this checkpoint" in load_error(tmp_path, "draft.z")


def test_rows_of_the_leading_axis_are_read_alone(tmp_path: Path) -> None:
    """Whatever the chunks."""
    directory = save_iteration(tmp_path, chunked(TENSORS, 3))
    checkpoint = CheckpointReader.open(directory)
    for rows in ([0], [6], [1, 2, 5], list(range(7))):
        assert checkpoint.load_rows("draft.a", rows).equal(TENSORS["draft.a"][rows])
    with pytest.raises(ValueError, match=r"draft\.a has 7 rows, not 7"):
        checkpoint.load_rows("draft.a", [0, 7])
