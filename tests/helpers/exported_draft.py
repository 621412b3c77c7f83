"""Hand-made drafts exported to Hugging Face files, changed there, and imported again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_eagle.checkpoint.directory import BaseInfo, parse_base
from megatron_eagle.hf.draft.checkpoint import StoredDraft
from megatron_eagle.hf.draft.export import export_draft
from megatron_eagle.hf.draft.formats import FORMATS
from megatron_eagle.hf.draft.import_hf import open_hf_draft
from tests.helpers.trained_draft import TrainedDraft

Files = tuple[dict[str, Any], dict[str, Tensor]]


def base_of(draft: TrainedDraft) -> BaseInfo:
    """Return the base that ``draft`` was trained on."""
    return parse_base(draft.metadata["base"], "the test's base")


def exported(folder: Path, fmt: str = "hf", **changes: Any) -> tuple[TrainedDraft, Path]:
    """Make a draft with the ``changes`` of Shape, save it and export it; return both."""
    draft = TrainedDraft.make(**changes)
    draft.save(folder / "ckpt")
    export_draft(folder / "ckpt", folder / "hf", fmt=FORMATS[fmt])
    return draft, folder / "hf"


def imported(directory: Path, draft: TrainedDraft, **options: Any) -> StoredDraft:
    """Open the Hugging Face draft in ``directory`` as one for the base of ``draft``."""
    options = {"aux_layers": None, "adapt": False, **options}
    return open_hf_draft(directory, base_of(draft), **options)


def rewrite(directory: Path, change: Any) -> Files:
    """Apply ``change(config, tensors)`` to the files in ``directory``, in place."""
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    change(config, tensors)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors")
    return config, tensors
