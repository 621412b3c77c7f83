"""Nothing in a checkpoint runs, by whatever door it is read, and a flipped bit is no weight."""

from __future__ import annotations

import io
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from megatron_eagle.checkpoint.loading import reason_of
from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.checkpoint.safe_reading import read_checkpoints_safely
from megatron_eagle.checkpoint.writer import write_torch_dist
from megatron_eagle.errors import UserError
from tests.helpers.hostile import CALLS, Hostile
from tests.helpers.trained_draft import chunked

TENSORS = {"draft.a": torch.randn(7, 3), "draft.b": torch.arange(5)}
OBJECT = "rng_state/shard_0_1"


@pytest.fixture(autouse=True)
def safe_reading() -> None:
    read_checkpoints_safely()


def saved(directory: Path, common: Any = None, other: Any = None) -> Path:
    """Write a checkpoint of two tensors, whose objects are plain unless others are handed in."""
    write_torch_dist(directory, chunked(TENSORS), common or {"iteration": 1}, {OBJECT: other})
    return directory


def as_torch_reads(directory: Path, key: str = OBJECT) -> Any:
    """Read an object as ``dist_checkpointing.load`` does, by PyTorch's own reader."""
    state: dict[str, Any] = {key: io.BytesIO()}
    dcp.load(state, storage_reader=FileSystemReader(directory), no_dist=True)
    return state[key]


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises((UserError, CheckpointException)) as caught:
        read()
    return reason_of(caught.value)


@pytest.mark.parametrize("call", CALLS)
def test_metadata_run_no_code(call: str, tmp_path: Path) -> None:
    directory, trap = saved(tmp_path / "ckpt"), tmp_path / "trap"
    payload = Hostile(call, trap)
    real = (directory / ".metadata").read_bytes()
    # Put in front of the real content, which follows it on the unpickler's stack; and alone.
    for content in (
        b"\x80\x04" + pickle.dumps(payload, 2)[2:-1] + b"0" + real[2:],
        pickle.dumps(payload),
    ):
        (directory / ".metadata").write_bytes(content)
        for read in (
            lambda: CheckpointReader.open(directory),
            lambda: FileSystemReader(directory).read_metadata(),
            lambda: as_torch_reads(directory),
        ):
            assert "refusing to unpickle" in refusal(read)
    assert not trap.exists()


@pytest.mark.parametrize("call", CALLS)
def test_objects_run_no_code(call: str, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    payload = Hostile(call, trap)
    directory = saved(tmp_path / "ckpt", {"args": payload}, payload)
    assert not trap.exists()
    for key in (OBJECT, "common_state/shard_0_1"):
        for read in (
            lambda key=key: as_torch_reads(directory, key),
            lambda key=key: CheckpointReader.open(directory).load_object(key),
        ):
            assert "refusing to unpickle" in refusal(read)
    assert not trap.exists()


@pytest.mark.parametrize("call", CALLS)
def test_index_caches_run_no_code(call: str, tmp_path: Path) -> None:
    """Megatron keeps them beside a data set, and a stranger's data set may bring its own."""
    from megatron.core.safe_globals import safe_numpy_load

    trap, file, saved_object = tmp_path / "trap", tmp_path / "index.npy", io.BytesIO()
    torch.save(Hostile(call, trap), saved_object)
    nested = pickle.dumps(saved_object.getvalue(), 3)[2:-1]
    for content in (
        pickle.dumps(Hostile(call, trap)),
        b"\x80\x03ctorch.storage\n_load_from_bytes\n" + nested + b"\x85R.",
    ):
        file.write_bytes(content)
        with pytest.raises(pickle.UnpicklingError) as caught:
            safe_numpy_load(file, allow_pickle=True, mmap_mode="r")
        assert re.search("disallowed class|[Ww]eights only", str(caught.value.__cause__))
    assert not trap.exists()


def test_the_variable_that_allows_all_pickles_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "trap"
    torch.save(Hostile("mkdir", trap), tmp_path / "old.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    read_checkpoints_safely()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "old.pt")
    assert not trap.exists()


def test_what_megatron_saves_is_read(tmp_path: Path) -> None:
    from argparse import Namespace

    import numpy as np

    rng = [
        {
            "random_rng_state": (3, (1, 2), None),
            "np_rng_state": ("MT19937", np.arange(4, dtype=np.uint32), 1),
            "torch": torch.get_rng_state(),
        }
    ]
    args = Namespace(lr=0.1, save=None, params_dtype=torch.bfloat16, names=["a"])
    directory = saved(tmp_path, {"args": args, "iteration": 7}, rng)
    common = as_torch_reads(directory, "common_state/shard_0_1")
    assert common[0]["args"] == args and common[0]["iteration"] == 7
    found = as_torch_reads(directory)[0][0]
    assert found["np_rng_state"][1].tolist() == [0, 1, 2, 3]
    assert found["torch"].equal(torch.get_rng_state())


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    (shard,) = directory.glob("*.distcp")
    whole, rng, refused = shard.read_bytes(), random.Random(1), 0
    for _ in range(150):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        shard.write_bytes(bytes(content))
        for read in (by_us, by_torch):
            try:
                found = read(directory)
            except (UserError, CheckpointException) as error:
                assert shard.name in reason_of(error)
                refused += 1
            else:
                assert all(found[key].equal(tensor) for key, tensor in TENSORS.items())
    assert refused > 50


def by_us(directory: Path) -> dict[str, torch.Tensor]:
    return CheckpointReader.open(directory).load(TENSORS)


def by_torch(directory: Path) -> dict[str, torch.Tensor]:
    state: dict[str, Any] = {key: torch.zeros_like(tensor) for key, tensor in TENSORS.items()}
    dcp.load(state, storage_reader=FileSystemReader(directory), no_dist=True)
    return state


def test_a_shard_that_is_cut_or_gone_is_named(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    (shard,) = directory.glob("*.distcp")
    whole = shard.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b"", None):
        shard.unlink(missing_ok=True)
        if content is not None:
            shard.write_bytes(content)
        assert shard.name in refusal(lambda: by_torch(directory))
        assert shard.name in refusal(CheckpointReader.open(directory).check_files)
        assert shard.name in refusal(lambda: list(CheckpointReader.open(directory).read_all()))
