"""Export: a trained draft's Megatron checkpoint -> one Hugging Face directory that servers load.

Reading order: ``info.py`` (the checkpoint's description of the draft), ``formats.py`` (the formats
and who reads them), ``names.py`` (the name table), ``checkpoint.py`` (the checks of the
checkpoint), ``config_json.py`` and ``card.py`` (config.json and README.md), and this file (the
weights and the output directory).

Shapes: D draft vocabulary, V base vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_eagle.checkpoint.atomic import atomic_dir, checked_output, owned_output
from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.draft.vocab import check_vocab_ids
from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.base_config import with_hf_config
from megatron_eagle.hf.draft.card import CardFacts, model_card
from megatron_eagle.hf.draft.checkpoint import read_entries, read_info
from megatron_eagle.hf.draft.config_json import draft_config_json, is_exported_draft
from megatron_eagle.hf.draft.entry import DraftEntry
from megatron_eagle.hf.draft.figures import measured_in_training
from megatron_eagle.hf.draft.formats import FORMATS, Format, check_servers
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.draft.module_files import check_has_names, module_card, module_config
from megatron_eagle.hf.draft.names import METADATA, VOCAB_IDS
from megatron_eagle.user_files import reading

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHOOSING = ".router.expert_bias"
"""Ending of a tensor that is fp32 whatever the weights are."""
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
    base_name: str | None = None,
    base_note: str | None = None,
    hf_config: Path | None = None,
    evaluation: dict[str, Any] | None = None,
    check: Check = lambda directory: None,
) -> DraftInfo:
    """Convert the checkpoint ``load`` into the directory ``output``.

    ``output`` gets model.safetensors, config.json and README.md, all at once by a rename. Memory:
    about twice the draft.

    Args:
        load: directory that training saved to, or one of its iterations.
        output: directory to create.
        dtype: dtype of the weights; None keeps the saved one.
        overwrite: replace an earlier export.
        progress: gets a line before each long step.
        fmt: format to write.
        data: description of the training data, for the model card.
        base_name: what users of the base type for it; None keeps the name of its import.
        base_note: which files of the base go with the draft, for the model card.
        hf_config: Hugging Face directory of a base that Megatron trained, for what its arguments do
            not say; None does without.
        evaluation: figures for the model card; None takes those measured while training.
        check: gets the directory of the finished files before the rename; if it raises, nothing is
            left behind.

    Raises:
        UserError: with the file at fault, unless the checkpoint holds a complete draft of finite
            weights that the servers of ``fmt`` can run.
    """
    with owned_output(Path(output), "output") as was_killed:
        was_killed = was_killed and not overwrite
        target = checked_output(Path(output), overwrite or was_killed, is_exported_draft)
        with reading("load", load):
            checkpoint = CheckpointReader.open(load)
            info = read_info(checkpoint)
            if base_name is not None:
                info = replace(info, base=replace(info.base, name=base_name))
            if hf_config is not None:
                info = replace(info, base=with_hf_config(info.base, hf_config))
            check_convertible(info, f"{checkpoint.directory}: {METADATA}")
            check_servers(fmt, info)
            evaluation = evaluation or measured_in_training(checkpoint.directory)
            progress(f"reading {checkpoint.directory}")
            tensors = convert_tensors(checkpoint, info, dtype=dtype, fmt=fmt)
        size = sum(tensor.nbytes for tensor in tensors.values())
        progress(f"writing {len(tensors)} tensors, {size / 2**20:.1f} MiB, to {target}")
        facts = CardFacts(
            checkpoint.directory.name, data=data, base_note=base_note, evaluation=evaluation
        )
        with atomic_dir(target, replace=True, was_killed=was_killed) as scratch:
            _write(scratch, tensors, info, fmt, facts)
            check(scratch)
    return info


def _write(
    directory: Path, tensors: dict[str, Tensor], info: DraftInfo, fmt: Format, facts: CardFacts
) -> None:
    """Write the files of an export into ``directory``."""
    dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    if info.spec.method.is_base_module:
        content = module_config(info, dtype)
        card = module_card(info, facts.checkpoint, facts.evaluation)
    else:
        content = draft_config_json(info, fmt, dtype)
        card = model_card(info, facts, fmt=fmt, dtype=dtype)
    config = json.dumps(content, indent=2) + "\n"
    (directory / "config.json").write_text(config, encoding="utf-8")
    (directory / "README.md").write_text(card, encoding="utf-8")
    # safetensors creates its file readable by its owner alone.
    mode = (directory / "config.json").stat().st_mode
    (directory / "model.safetensors").chmod(mode)


def check_convertible(info: DraftInfo, source: str) -> None:
    """Raise ``UserError``, starting with ``source``, for a draft that no format has."""
    if info.spec.method.is_base_module:
        check_has_names(info, source)
    elif not info.has_names:
        raise UserError(
            f"{source}: a MoE draft cannot be converted: no server's EAGLE reader has experts"
        )


def convert_tensors(
    checkpoint: CheckpointReader,
    info: DraftInfo,
    *,
    dtype: torch.dtype | None,
    fmt: Format,
) -> dict[str, Tensor]:
    """Return the tensors of the export by their names: the weights and the vocabulary maps.

    Raises ``UserError`` unless the checkpoint holds exactly the draft's tensors, of the expected
    shapes, of one floating dtype (or ``dtype`` is given), finite also in the dtype written.
    """
    where, entries = checkpoint.directory, read_entries(checkpoint, info, fmt)
    stored = checkpoint.load([*(entry.megatron for entry in entries), VOCAB_IDS])
    vocab_ids = stored.pop(VOCAB_IDS)
    trained = {key: value for key, value in stored.items() if not key.endswith(_CHOOSING)}
    dtype = dtype or _common_dtype(trained, where)
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        whole = stored.pop(entry.megatron)
        own = whole.dtype if entry.megatron.endswith(_CHOOSING) else dtype
        tensors |= hf_tensors(entry, whole, info, own, f"{where}: {entry.megatron}")
    if fmt.name in info.spec.method.zero_fc_bias:
        tensors["fc.bias"] = torch.zeros_like(tensors["fc.weight"][:, 0])
    return tensors | vocabulary_maps(vocab_ids, info, f"{where}: {VOCAB_IDS}")


def hf_tensors(
    entry: DraftEntry, whole: Tensor, info: DraftInfo, dtype: torch.dtype, source: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield by name the Hugging Face tensors in the ``whole`` Megatron tensor of ``entry``, copies
    in ``dtype``. Raises ``UserError``, starting with ``source``, for one that is not finite in it.
    """
    parts = entry.split(whole, entry.sources, info.dims)
    for part, tensor in zip(entry.sources, parts, strict=True):
        _check_finite(tensor, dtype, source)
        yield part.name, tensor.to(dtype).clone(memory_format=torch.contiguous_format)


def vocabulary_maps(vocab_ids: Tensor, info: DraftInfo, source: str) -> dict[str, Tensor]:
    """Return the maps between the two vocabularies: ``d2t`` int64 [D] and ``t2d`` bool [V].

    The base's id of draft id i is i + d2t[i]; t2d is true for the ids that the draft has. An
    uncompressed vocabulary gets no maps, because vLLM refuses them there.
    """
    if vocab_ids.dtype != torch.int64:
        raise UserError(f"{source}: token ids must be int64, found {vocab_ids.dtype}")
    check_vocab_ids(vocab_ids, info.base.vocab_size, source)
    if not info.compressed:
        return {}
    t2d = torch.zeros(info.base.vocab_size, dtype=torch.bool)
    t2d[vocab_ids] = True
    return {"d2t": vocab_ids - torch.arange(vocab_ids.numel()), "t2d": t2d}


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
