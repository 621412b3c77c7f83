"""Import of a base's own next-token module, from the base's Hugging Face directory, or from the
directory that the conversion of such a draft wrote."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.config import DraftSpec, TrainOptions
from megatron_eagle.errors import UserError, literal
from megatron_eagle.hf.base.chunks import CHUNK_BYTES, EMBEDDING_NAME
from megatron_eagle.hf.base.families import FAMILIES, family_of
from megatron_eagle.hf.base.megatron_args import megatron_args
from megatron_eagle.hf.base.module_names import ModuleNames
from megatron_eagle.hf.draft.base_module import beside_base
from megatron_eagle.hf.draft.checkpoint import StoredDraft
from megatron_eagle.hf.draft.embedding import BASE_NAME
from megatron_eagle.hf.draft.entry import DraftEntry
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.draft.module_entries import family_of_base, module_entries, module_prefix
from megatron_eagle.hf.files.weights_dir import WeightsDir

ALGORITHM = "mtp"
EXPERT_BIAS = "mlp.gate.e_score_correction_bias"


def is_base_config(config: dict[str, Any]) -> bool:
    """Return whether config.json is that of a base with a next-token module of its own."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    family = FAMILIES.get(name) if isinstance(name, str) else None
    module = family.module if family is not None else None
    return module is not None and bool(module.count_in(config))


def open_base_module(
    directory: Path, base: BaseInfo, *, base_directory: str | Path | None = None
) -> StoredDraft:
    """Check the next-token module in ``directory`` against ``base``, from headers.

    ``base_directory``: the base's checkpoint, to compare the embedding with; None skips that.
    Raises ``UserError`` with the file at fault.
    """
    weights = WeightsDir(directory)
    names = _check_base(weights, base)
    spec = beside_base(DraftSpec(algorithm=ALGORITHM), base.megatron_args)
    info = DraftInfo(spec, base, TrainOptions().ttt_steps)
    entries = module_entries(info)
    _check_names(weights, entries, info, names)
    if base_directory is not None and EMBEDDING_NAME in weights.headers:
        expected = CheckpointReader.open(base_directory).first_rows(BASE_NAME)
        rows = weights.tensor(EMBEDDING_NAME, 0, expected.shape[0])
        if not rows.float().equal(expected.float()):
            raise UserError(f"{directory}: {EMBEDDING_NAME} is not that of {base_directory}")
    dtypes = {weights.dtype(part.name) for entry in entries for part in entry.sources}
    return StoredDraft(
        source=str(directory),
        info=info,
        vocab_ids=torch.arange(base.vocab_size),
        tensors={entry.megatron: partial(_read, weights, entry, info) for entry in entries},
        shapes={entry.megatron: entry.sizes(info.dims) for entry in entries},
        dtype=next(iter(dtypes)) if len(dtypes) == 1 else torch.float32,
    )


def _check_base(weights: WeightsDir, base: BaseInfo) -> ModuleNames:
    """Check that config.json is the base's and has one module; return its names."""
    source = str(weights.path / "config.json")
    family = family_of(weights.config, source)
    if family.name != base.family:
        raise UserError(f"{source}: a {family.name} model, the base {base.name} is {base.family}")
    assert family.module is not None
    for name, value in megatron_args(weights.config, family, source).items():
        if base.megatron_args.get(name) != value:
            raise UserError(
                f"{source}: {name} is {value}, the base {base.name} has "
                f"{base.megatron_args.get(name)}"
            )
    count = family.module.count_in(weights.config)
    if count != 1:
        raise UserError(
            f"{source}: {family.module.counted_by} is {literal(count)}; a module is trained to be "
            "run step after step, and only the one of a base that has one is read"
        )
    return family.module


def _check_names(
    weights: WeightsDir, entries: list[DraftEntry], info: DraftInfo, names: ModuleNames
) -> None:
    """Raise ``UserError`` unless the files hold exactly the tensors of one module, and its copies
    of the base's tensors are copies."""
    prefix = module_prefix(info)
    expected = {part.name: part.sizes(info.dims) for entry in entries for part in entry.sources}
    present = {name for name in weights.headers if name.startswith(prefix)}
    if missing := sorted(set(expected) - present):
        raise UserError(f"{weights.path}: no whole next-token module, {missing[0]} is missing")
    family = family_of_base(info)
    ignored = [names.layer + name for name in family.ignored_in_layer]
    known = {prefix + name for name in (*names.copies, *ignored)}
    if unknown := sorted(present - set(expected) - known):
        raise UserError(f"{weights.path}: {unknown[0]} is unknown in a next-token module")
    weights.check(expected, set(weights.headers) - set(expected))
    for name, original in names.copies.items():
        _check_copy(weights, prefix + name, original)


def _check_copy(weights: WeightsDir, name: str, original: str) -> None:
    """Raise ``UserError`` if the module's copy ``name`` of the base's tensor is none."""
    if name not in weights.headers or original not in weights.headers:
        return
    shape = weights.headers[original].shape
    same = weights.headers[name].shape == shape
    rows = max(1, CHUNK_BYTES // (4 * math.prod(shape[1:])))
    for start in range(0, shape[0] if same else 0, rows):
        stop = min(start + rows, shape[0])
        same = same and weights.tensor(name, start, stop).equal(
            weights.tensor(original, start, stop)
        )
    if not same:
        raise UserError(
            f"{weights.headers[name].file}: {name} is not {original}, which training would use"
        )


def _read(weights: WeightsDir, entry: DraftEntry, info: DraftInfo) -> Tensor:
    """Read the Megatron tensor of ``entry``."""
    parts = []
    for part in entry.sources:
        tensor = weights.tensor(part.name)
        if not tensor.isfinite().all():
            raise UserError(f"{weights.path}: {part.name} holds NaN or infinite values")
        parts.append(tensor)
    return entry.join(parts, info.dims)
