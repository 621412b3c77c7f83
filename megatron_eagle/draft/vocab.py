"""The draft's vocabulary: base ids counted from supervised tokens, or read from a file.

``vocab_ids`` [D] int64 holds base ids, ascending; files write it as offsets ``d2t[i] =
vocab_ids[i] - i``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import reading


def choose_vocab_ids(counts: Tensor, size: int, always: Iterable[int]) -> Tensor:
    """Choose the ``size`` ids to draft: all of ``always`` (special and byte tokens), then the most
    frequent, then the lowest unused ids to fill up. ``counts`` [V] int64 -> [size], ascending."""
    vocab_size = counts.numel()
    if size > vocab_size:
        raise UserError(f"<draft_vocab_size> {size} exceeds the vocabulary of {vocab_size}")
    required = sorted({i for i in always if 0 <= i < vocab_size})
    if len(required) > size:
        raise UserError(
            f"<draft_vocab_size> {size} cannot hold the {len(required)} special and byte "
            "tokens that every draft keeps"
        )
    rank = counts.clone()
    rank[required] = torch.iinfo(torch.int64).max
    by_count = torch.sort(rank, descending=True, stable=True).indices
    return by_count[:size].sort().values


def load_vocab_ids(file: str, vocab_size: int, size: int | None) -> Tensor:
    """Read a ``vocab_map``, a safetensors file with ``vocab_ids`` or with ``d2t``."""
    with reading("vocab_map", file):
        if not Path(file).is_file():
            raise UserError(f"<vocab_map> {literal(file)}: no such file")
        try:
            ids = _stored_ids(file)
        except SafetensorError as error:
            raise UserError(
                f"<vocab_map> {literal(file)}: not a whole safetensors file: {literal(error)}"
            ) from error
    check_vocab_ids(ids, vocab_size, f"<vocab_map> {file}")
    if size is not None and ids.numel() != size:
        raise UserError(f"<vocab_map> {file} holds {ids.numel()} ids, <draft_vocab_size> is {size}")
    return ids


def _stored_ids(file: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        names = set(tensors.keys())
        if "vocab_ids" in names:
            return tensors.get_tensor("vocab_ids").long()
        if "d2t" in names:
            offsets = tensors.get_tensor("d2t").long()
            return offsets + torch.arange(offsets.numel())
    raise UserError(
        f"<vocab_map> {literal(file)}: holds neither 'vocab_ids' nor 'd2t' but "
        f"{literal(sorted(names)[:4])}"
    )


def check_vocab_ids(ids: Tensor, vocab_size: int, source: str) -> None:
    """Raise ``ValueError`` naming ``source`` unless ``ids`` is 1-D, ascending and in range."""
    if ids.dim() != 1 or ids.numel() == 0:
        raise UserError(f"{source}: the draft vocabulary must be a non-empty list of ids")
    if bool((ids[1:] <= ids[:-1]).any()):
        raise UserError(f"{source}: the draft vocabulary's ids are not ascending")
    if int(ids[0]) < 0 or int(ids[-1]) >= vocab_size:
        raise UserError(
            f"{source}: the draft vocabulary's ids reach from {int(ids[0])} to {int(ids[-1])}, "
            f"the base has ids 0 to {vocab_size - 1}"
        )
