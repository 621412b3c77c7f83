"""A draft's Megatron checkpoint, read and written without building the draft."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_eagle.checkpoint.atomic import atomic_dir, check_unused, owned_output
from megatron_eagle.checkpoint.directory import TRACKER_NAME
from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.checkpoint.writer import Chunk, write_torch_dist
from megatron_eagle.draft.metadata import draft_metadata, encode_metadata
from megatron_eagle.draft.vocab import check_vocab_ids
from megatron_eagle.errors import UserError
from megatron_eagle.hf.base.import_base import COMMON_STATE, RELEASE
from megatron_eagle.hf.draft.entry import DraftEntry
from megatron_eagle.hf.draft.formats import FORMATS, Format
from megatron_eagle.hf.draft.info import DraftInfo, parse_draft_info
from megatron_eagle.hf.draft.names import METADATA, PREFIX, VOCAB_IDS, draft_entries


@dataclass(frozen=True)
class StoredDraft:
    """A draft whose weights are still in files, as a checkpoint holds it.

    Attributes:
        source: the directory that it comes from, for error messages.
        info: its description.
        vocab_ids: base token ids of its vocabulary, int64 [D], ascending.
        tensors: checkpoint key (``draft.fc.weight``, ...) -> function that reads the whole,
            unsharded, unpadded tensor.
        shapes: the shapes of ``tensors``.
        dtype: the dtype to write ``tensors`` in.
    """

    source: str
    info: DraftInfo
    vocab_ids: Tensor
    tensors: Mapping[str, Callable[[], Tensor]]
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype


def read_info(checkpoint: CheckpointReader) -> DraftInfo:
    """Return the description of the draft in ``checkpoint``; raise ``UserError`` without one."""
    keys = checkpoint.keys()
    if not any(key.startswith(PREFIX) for key in keys):
        raise UserError(f"{checkpoint.directory}: holds no draft (no {PREFIX}* tensor)")
    tensor = checkpoint.load([METADATA])[METADATA]
    return parse_draft_info(tensor, f"{checkpoint.directory}: {METADATA}")


def read_entries(
    checkpoint: CheckpointReader, info: DraftInfo, fmt: Format = FORMATS["hf"]
) -> list[DraftEntry]:
    """Return the name table of the draft in ``checkpoint``, after comparing the two.

    Raises ``UserError`` naming a tensor that is missing, unexpected or of a wrong shape. Servers
    run a draft with missing tensors without an error, so this must be strict.
    """
    where, dims, entries = checkpoint.directory, info.dims, draft_entries(info, fmt)
    stored_keys = checkpoint.keys()
    keys = {key for key in stored_keys if key.startswith(PREFIX)}
    expected = {entry.megatron for entry in entries} | {METADATA, VOCAB_IDS}
    if missing := sorted(expected - keys):
        raise UserError(f"{where}: incomplete draft, {_listed(missing)} missing")
    if unexpected := sorted(keys - expected):
        raise UserError(
            f"{where}: {_listed(unexpected)} unexpected in an {info.spec.algorithm} draft"
        )
    for entry in entries:
        shape = checkpoint.shape(entry.megatron)
        if not entry.accepts(shape, dims):
            raise UserError(
                f"{where}: {entry.megatron} has shape {shape}, expected {entry.sizes(dims)}"
            )
    shape = checkpoint.shape(VOCAB_IDS)
    if shape != (info.draft_vocab_size,):
        raise UserError(f"{where}: {VOCAB_IDS} has shape {shape}, expected {info.draft_vocab_size}")
    return entries


def open_checkpoint_draft(directory: str | Path) -> StoredDraft:
    """Open the draft of a checkpoint that training or ``write_draft_checkpoint`` wrote.

    Raises ``UserError`` with the file at fault unless the draft is complete.
    """
    checkpoint = CheckpointReader.open(directory)
    info = read_info(checkpoint)
    if not info.has_names:
        raise UserError(
            f"{checkpoint.directory}: a MoE draft is no warm start; <load> resumes its training"
        )
    entries = read_entries(checkpoint, info)
    vocab_ids = checkpoint.load([VOCAB_IDS])[VOCAB_IDS]
    check_vocab_ids(vocab_ids, info.base.vocab_size, f"{checkpoint.directory}: {VOCAB_IDS}")

    def load(key: str, rows: int) -> Tensor:
        return checkpoint.load([key])[key][:rows]

    shapes = {entry.megatron: entry.sizes(info.dims) for entry in entries}
    return StoredDraft(
        source=str(checkpoint.directory),
        info=info,
        vocab_ids=vocab_ids,
        tensors={key: partial(load, key, shape[0]) for key, shape in shapes.items()},
        shapes=shapes,
        dtype=torch.float32,
    )


def write_draft_checkpoint(stored: StoredDraft, save: Path) -> None:
    """Write checkpoint directory ``save``, which appears by a rename when it is complete.

    It holds no optimizer and loads at any parallel layout. Memory: the largest tensor. Raises
    ``UserError`` when ``save`` is in use.
    """
    with owned_output(save, "save") as was_killed:
        if was_killed and _is_finished(stored, save):
            return
        check_unused(save, "save")
        with atomic_dir(save) as scratch:
            write_torch_dist(scratch / RELEASE, list(_chunks(stored)), COMMON_STATE, {})
            (scratch / TRACKER_NAME).write_text(RELEASE, encoding="utf-8")


def _is_finished(stored: StoredDraft, save: Path) -> bool:
    """Return whether ``save`` is described as ``stored`` is: a run was killed after its rename."""
    if not (save / TRACKER_NAME).is_file():
        return False
    expected = _description(stored)
    found = CheckpointReader.open(save).load(list(expected))
    return all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def _description(stored: StoredDraft) -> dict[str, Tensor]:
    info = stored.info
    metadata = draft_metadata(
        info.spec, info.base, ttt_steps=info.ttt_steps, training=dict(info.training)
    )
    return {VOCAB_IDS: stored.vocab_ids, METADATA: encode_metadata(metadata)}


def _chunks(stored: StoredDraft) -> Iterator[Chunk]:
    for key, tensor in _description(stored).items():
        yield _whole_tensor(key, tuple(tensor.shape), tensor.dtype, load=partial(_same, tensor))
    for key, load in stored.tensors.items():
        load_cast = partial(_cast, load, stored.dtype)
        yield _whole_tensor(key, stored.shapes[key], stored.dtype, load=load_cast)


def _whole_tensor(
    key: str, shape: tuple[int, ...], dtype: torch.dtype, *, load: Callable[[], Tensor]
) -> Chunk:
    return Chunk(
        key=key, global_shape=shape, offset=(0,) * len(shape), shape=shape, dtype=dtype, load=load
    )


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _cast(load: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    return load().to(dtype)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
