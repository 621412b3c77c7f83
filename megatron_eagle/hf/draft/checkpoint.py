"""A draft's Megatron checkpoint, read and written without building the draft."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.checkpoint.atomic import atomic_dir, check_unused
from megatron_eagle.checkpoint.directory import TRACKER_NAME
from megatron_eagle.checkpoint.reader import DraftCheckpoint
from megatron_eagle.checkpoint.writer import Chunk, write_torch_dist
from megatron_eagle.draft.metadata import draft_metadata, encode_metadata
from megatron_eagle.draft.vocab import check_vocab_ids
from megatron_eagle.errors import UserError
from megatron_eagle.hf.base.import_base import COMMON_STATE, RELEASE
from megatron_eagle.hf.draft.export import read_entries, read_info
from megatron_eagle.hf.draft.import_hf import StoredDraft
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.draft.names import METADATA, VOCAB_IDS

LINEAR_LAYERS = ("self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def open_checkpoint_draft(directory: str | Path) -> StoredDraft:
    """The draft in a checkpoint that training saved or `write_draft_checkpoint` wrote.

    Raises ValueError with the file at fault unless it is complete.
    """
    checkpoint = DraftCheckpoint.open(directory)
    info = read_info(checkpoint)
    if info.spec.num_experts is not None:
        raise UserError(
            f"{checkpoint.directory}: a MoE draft is no warm start; <load> resumes its training"
        )
    entries = read_entries(checkpoint, info)
    ids = checkpoint.load([VOCAB_IDS])[VOCAB_IDS]
    check_vocab_ids(ids, info.base.vocab_size, f"{checkpoint.directory}: {VOCAB_IDS}")

    def load(key: str, rows: int) -> Tensor:
        return checkpoint.load([key])[key][:rows]

    tensors = {
        entry.megatron: partial(load, entry.megatron, entry.sizes(info.dims)[0])
        for entry in entries
    }
    shapes = {entry.megatron: entry.sizes(info.dims) for entry in entries}
    return StoredDraft(str(checkpoint.directory), info, ids, tensors, shapes, torch.float32)


def write_draft_checkpoint(stored: StoredDraft, save: Path) -> None:
    """Write checkpoint directory `save`, which appears by a rename when complete.

    It loads at any layout and holds no optimizer. Memory: the largest tensor. Raises ValueError
    when `save` is in use.
    """
    check_unused(save, "save")
    with atomic_dir(save) as scratch:
        states = {f"{name}/shard_0_1": None for name in _extra_states(stored.info)}
        write_torch_dist(scratch / RELEASE, list(_chunks(stored)), COMMON_STATE, states)
        (scratch / TRACKER_NAME).write_text(RELEASE, encoding="utf-8")


def _chunks(stored: StoredDraft) -> Iterator[Chunk]:
    info = stored.info
    description = draft_metadata(
        info.spec, info.base, ttt_steps=info.ttt_steps, training=dict(info.training)
    )
    small = {VOCAB_IDS: stored.vocab_ids, METADATA: encode_metadata(description)}
    for key, tensor in small.items():
        yield _whole(key, tuple(tensor.shape), tensor.dtype, partial(_given, tensor))
    for key, load in stored.tensors.items():
        yield _whole(key, stored.shapes[key], stored.dtype, partial(_as, load, stored.dtype))


def _whole(key: str, shape: tuple[int, ...], dtype: torch.dtype, load: Any) -> Chunk:
    return Chunk(key, shape, (0,) * len(shape), shape, dtype, load)


def _given(tensor: Tensor) -> Tensor:
    return tensor


def _as(load: Any, dtype: torch.dtype) -> Tensor:
    return load().to(dtype)


def _extra_states(info: DraftInfo) -> list[str]:
    """Megatron's linear layers ask for an (empty) extra state when a checkpoint is loaded."""
    inputs = ["linear_qkv"]
    if info.spec.uses_mla:
        low_rank = info.layer_args["q_lora_rank"]
        inputs = ["linear_q_up_proj" if low_rank else "linear_q_proj", "linear_kv_up_proj"]
    modules = [*(f"self_attention.{name}" for name in inputs), *LINEAR_LAYERS]
    layers = [
        f"draft.layers.{i}.{module}._extra_state"
        for i in range(info.num_layers)
        for module in modules
    ]
    head = [] if info.spec.method.shares_base_head else ["draft.lm_head._extra_state"]
    return [*head, *layers]
