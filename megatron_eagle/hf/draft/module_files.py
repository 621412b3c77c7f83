"""What a converted next-token module is written as: tensors under the base's names, the base's
config.json with a mark, and a model card that says how they come back into the base's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.errors import UserError
from megatron_eagle.hf.base.stitch import MARK
from megatron_eagle.hf.draft.checkpoint import read_entries, read_info
from megatron_eagle.hf.draft.commands import module_commands
from megatron_eagle.hf.draft.figures import figure_rows
from megatron_eagle.hf.draft.import_module import open_base_module
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.draft.module_entries import module_prefix, names_of_module


def check_has_names(info: DraftInfo, source: str) -> None:
    """Raise ``UserError``, starting with ``source``, if no server looks for a next-token module in
    the files of this base's family."""
    if names_of_module(info) is None:
        raise UserError(
            f"{source}: a {info.base.family} base has no next-token module, and no server looks "
            "for one in its files"
        )


def module_config(info: DraftInfo, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json of a converted module with weights of ``dtype``."""
    names = names_of_module(info)
    assert names is not None, "the files of this family hold modules"
    return {
        **info.base.hf_config,
        names.counted_by: 1,
        "torch_dtype": str(dtype).removeprefix("torch."),
        MARK: {"base": info.base.name, "prefix": module_prefix(info), "steps": info.ttt_steps},
    }


def module_card(info: DraftInfo, checkpoint: str, evaluation: dict[str, Any] | None) -> str:
    """Return README.md of a converted module; ``checkpoint`` names what was converted."""
    rows = [
        ("base", f"`{Path(info.base.name).name}` ({info.base.family})"),
        ("tensors", f"`{module_prefix(info)}*`"),
        ("trained for", f"{info.ttt_steps} steps, each reading the one before"),
        ("converted from", f"`{checkpoint}`"),
        *figure_rows(evaluation),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    names = names_of_module(info)
    vllm_differs = names.vllm_differs if names is not None else ""
    return f"""---
tags:
- mtp
- speculative-decoding
---
# Next-token module of {Path(info.base.name).name}

| | |
|---|---|
{table}

Servers read the module from the base's own files. Put it into a copy of them, `BASE`, and serve
that; embedding and output layer are the base's:

{module_commands(info.ttt_steps, vllm_differs)}
The conversion wrote and checked these files; it ran no server on them.
"""


def check_module(load: str | Path, exported: Path) -> None:
    """Raise ``UserError`` unless the files in ``exported``, read back as a module, hold every
    tensor of the checkpoint ``load`` in the dtype that they were written in."""
    checkpoint = CheckpointReader.open(load)
    info = read_info(checkpoint)
    back = open_base_module(exported, info.base)
    for entry in read_entries(checkpoint, info):
        key = entry.megatron
        found, saved = back.tensors[key](), checkpoint.load([key])[key]
        if not found.equal(saved.to(found.dtype)):
            raise UserError(f"<verify>: {exported}: {key} is not that of {checkpoint.directory}")
