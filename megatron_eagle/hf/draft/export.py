"""A trained draft's Megatron checkpoint -> one Hugging Face directory that servers load.

Reading order: `draft_info` (what the checkpoint says of itself), `draft_formats` (the formats and
who reads them), `draft_names` (the name table), `draft_config` and `draft_card` (config.json and
README.md), and here the checks and the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_eagle.checkpoint.atomic import atomic_dir, checked_output
from megatron_eagle.checkpoint.reader import DraftCheckpoint
from megatron_eagle.draft.vocab import check_vocab_ids
from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.card import CardFacts, measured_in_training, model_card
from megatron_eagle.hf.draft.config_json import draft_config_json, is_exported_draft
from megatron_eagle.hf.draft.formats import FORMATS, Format, check_servers
from megatron_eagle.hf.draft.info import DraftInfo, parse_draft_info
from megatron_eagle.hf.draft.names import METADATA, PREFIX, VOCAB_IDS, DraftEntry, draft_entries

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Progress = Callable[[str], None]
Check = Callable[[Path], None]


def export_draft(
    load: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress = lambda line: None,
    fmt: Format = FORMATS["hf"],
    data: str | None = None,
    evaluation: dict[str, Any] | None = None,
    check: Check = lambda directory: None,
) -> DraftInfo:
    """Convert the checkpoint `load` (DIR, or one of its iterations) into the directory `output`.

    `output` gets model.safetensors, config.json and README.md, all at once by a rename, after
    `check` has passed on the finished files; `overwrite` replaces an earlier export. `dtype` None
    keeps the saved one. `data` and `evaluation` go to the model card, see `CardFacts`; without the
    latter, what training measured of this draft. Memory: about twice the draft.

    Raises ValueError, with the file at fault, for anything but a complete draft of finite weights
    that the servers of `fmt` can run.
    """
    target = checked_output(Path(output), overwrite, is_exported_draft)
    checkpoint = DraftCheckpoint.open(load)
    info = read_info(checkpoint)
    _check_convertible(info, f"{checkpoint.directory}: {METADATA}")
    check_servers(fmt, info)
    evaluation = evaluation or measured_in_training(checkpoint.directory)
    progress(f"reading {checkpoint.directory}")
    tensors = convert(checkpoint, info, dtype, fmt)
    weights = tensors["fc.weight"].dtype
    size = sum(tensor.nbytes for tensor in tensors.values())
    progress(f"writing {len(tensors)} tensors, {size / 2**20:.1f} MiB, to {target}")
    with atomic_dir(target, replace=True) as scratch:
        save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        config = json.dumps(draft_config_json(info, fmt, weights), indent=2) + "\n"
        (scratch / "config.json").write_text(config, encoding="utf-8")
        card = model_card(
            info, CardFacts(checkpoint.directory.name, data, evaluation), fmt, weights
        )
        (scratch / "README.md").write_text(card, encoding="utf-8")
        # safetensors creates its file readable by its owner alone.
        mode = (scratch / "config.json").stat().st_mode
        (scratch / "model.safetensors").chmod(mode)
        check(scratch)
    return info


def read_info(checkpoint: DraftCheckpoint) -> DraftInfo:
    """DraftInfo of a checkpoint that holds a draft."""
    keys = checkpoint.keys()
    if not any(key.startswith(PREFIX) for key in keys):
        raise UserError(f"{checkpoint.directory}: holds no draft (no {PREFIX}* tensor)")
    tensor = checkpoint.load([METADATA])[METADATA]
    return parse_draft_info(tensor, f"{checkpoint.directory}: {METADATA}")


def _check_convertible(info: DraftInfo, source: str) -> None:
    if info.spec.num_experts is not None:
        raise UserError(
            f"{source}: a MoE draft cannot be converted: no server's EAGLE reader has experts"
        )


def convert(
    checkpoint: DraftCheckpoint,
    info: DraftInfo,
    dtype: torch.dtype | None,
    fmt: Format,
) -> dict[str, Tensor]:
    """Hugging Face name -> tensor: the weights, and d2t int64 [D] and t2d bool [V] if compressed.

    Raises ValueError unless the checkpoint holds exactly the draft's tensors, of the expected
    shapes, of one floating dtype (or `dtype` is given), finite also in the dtype written.
    """
    where, dims, entries = checkpoint.directory, info.dims, read_entries(checkpoint, info, fmt)
    stored = checkpoint.load([*(entry.megatron for entry in entries), VOCAB_IDS])
    vocab_ids = stored.pop(VOCAB_IDS)
    dtype = dtype or _common_dtype(stored, where)
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        whole = stored.pop(entry.megatron)
        for source, part in zip(entry.sources, entry.split(whole, entry, dims), strict=True):
            _check_finite(part, dtype, f"{where}: {entry.megatron}")
            tensors[source.name] = part.to(dtype).clone(memory_format=torch.contiguous_format)
    if fmt.name in info.spec.method.zero_fc_bias:
        tensors["fc.bias"] = torch.zeros_like(tensors["fc.weight"][:, 0])
    return tensors | vocabulary_maps(vocab_ids, info, f"{where}: {VOCAB_IDS}")


def vocabulary_maps(vocab_ids: Tensor, info: DraftInfo, source: str) -> dict[str, Tensor]:
    """`d2t` (offsets: base id = i + d2t[i]) and `t2d`; nothing for an uncompressed vocabulary,
    which vLLM refuses to find mapped."""
    if vocab_ids.dtype != torch.int64:
        raise UserError(f"{source}: token ids must be int64, found {vocab_ids.dtype}")
    check_vocab_ids(vocab_ids, info.base.vocab_size, source)
    if not info.compressed:
        return {}
    t2d = torch.zeros(info.base.vocab_size, dtype=torch.bool)
    t2d[vocab_ids] = True
    return {"d2t": vocab_ids - torch.arange(vocab_ids.numel()), "t2d": t2d}


def read_entries(
    checkpoint: DraftCheckpoint, info: DraftInfo, fmt: Format = FORMATS["hf"]
) -> list[DraftEntry]:
    """The name table of the draft in `checkpoint`, which holds exactly its tensors: servers do not
    fail on missing ones, so this must. Raises ValueError naming what is wrong."""
    where, dims, keys = checkpoint.directory, info.dims, checkpoint.keys()
    entries = draft_entries(info, fmt)
    found = {key for key in keys if key.startswith(PREFIX)}
    expected = {entry.megatron for entry in entries} | {METADATA, VOCAB_IDS}
    if missing := sorted(expected - found):
        raise UserError(f"{where}: incomplete draft, {_listed(missing)} missing")
    if unexpected := sorted(found - expected):
        raise UserError(
            f"{where}: {_listed(unexpected)} unexpected in an {info.spec.algorithm} draft"
        )
    for entry in entries:
        shape = checkpoint.shape(entry.megatron)
        if not entry.accepts(shape, dims):
            raise UserError(
                f"{where}: {entry.megatron} has shape {shape}, expected {entry.sizes(dims)}"
            )
    ids = checkpoint.shape(VOCAB_IDS)
    if ids != (info.draft_vocab_size,):
        raise UserError(f"{where}: {VOCAB_IDS} has shape {ids}, expected {info.draft_vocab_size}")
    return entries


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _common_dtype(tensors: dict[str, Tensor], where: Path) -> torch.dtype:
    dtypes = sorted({_name(tensor.dtype) for tensor in tensors.values()})
    if len(dtypes) > 1:
        raise UserError(f"{where}: holds {' and '.join(dtypes)} weights; choose one with <dtype>")
    if dtypes[0] not in DTYPES:
        raise UserError(f"{where}: weights of dtype {dtypes[0]}; choose another with <dtype>")
    return DTYPES[dtypes[0]]


def _check_finite(tensor: Tensor, dtype: torch.dtype, source: str) -> None:
    if not tensor.isfinite().all():
        raise UserError(f"{source}: holds NaN or infinite values")
    if not tensor.to(dtype).isfinite().all():
        raise UserError(f"{source}: values overflow with <dtype> {_name(dtype)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
