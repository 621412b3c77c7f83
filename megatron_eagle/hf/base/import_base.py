"""A Hugging Face base -> a Megatron ``torch_dist`` checkpoint that loads at any TP, PP and EP.

``chunks`` names the global tensors. Vocabulary rows are unpadded: Megatron's vocabulary tensors
accept a shorter one and fill in zeros. docs/design/architecture.md says why Megatron-Bridge is not
used.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.checkpoint.atomic import atomic_dir, check_unused, owned_output
from megatron_eagle.checkpoint.base_fields import (
    check_complete,
    check_megatron_args,
    check_rope,
    check_token_ids,
)
from megatron_eagle.checkpoint.directory import (
    BASE_JSON_NAME,
    TRACKER_NAME,
    BaseInfo,
    load_base_json,
)
from megatron_eagle.checkpoint.writer import Chunk, write_torch_dist
from megatron_eagle.hf.base.chunks import BaseTensors, Progress
from megatron_eagle.hf.base.families import family_of
from megatron_eagle.hf.base.megatron_args import facts_of, megatron_args
from megatron_eagle.hf.base.rope_args import rope_beyond_args
from megatron_eagle.hf.files.generation_config import with_all_ends
from megatron_eagle.hf.files.weights_dir import WeightsDir
from megatron_eagle.user_files import reading

RELEASE = "release"
_HUB = "models--"
COMMON_STATE = {"checkpoint_version": 3.0, "iteration": 0}
"""Without a version Megatron takes the checkpoint for one of 2019 and permutes linear_qkv."""


def import_base(
    hf_dir: Path, save: Path, progress: Progress = lambda line: None, name: str | None = None
) -> BaseInfo:
    """Write checkpoint directory ``save`` from the model in ``hf_dir``; return its description.

    ``name`` is what the base is called in the description and in exported drafts, by which servers
    find it; by default ``model_name(hf_dir)``.

    Everything is checked from headers before the first byte is written; ``save`` appears by rename
    when complete. Raises UserError for an unsupported or corrupt ``hf_dir``, or a ``save`` in use.
    """
    name = name or model_name(hf_dir)
    with owned_output(save, "save") as was_killed:
        finished = _finished(hf_dir, save, name) if was_killed else None
        if finished is not None:
            return finished
        check_unused(save, "save")
        return _import(hf_dir, save, progress, name)


def _finished(hf_dir: Path, save: Path, name: str) -> BaseInfo | None:
    """Return the description in ``save`` if it is of the model in ``hf_dir``: a run was killed
    after its rename."""
    if not (save / BASE_JSON_NAME).is_file():
        return None
    base = load_base_json(save)
    with reading("hf", hf_dir):
        config = with_all_ends(WeightsDir(hf_dir).config, hf_dir, base.vocab_size)
    return base if (base.name, base.hf_config) == (name, config) else None


def model_name(directory: Path) -> str:
    """Return a name by which servers find the model in ``directory``: its id on the hub if it lies
    in the hub's cache (``models--ORG--NAME/snapshots/COMMIT``), else its absolute path."""
    resolved = directory.resolve()
    folder, above = resolved.parent.name, resolved.parent.parent.name
    if folder == "snapshots" and above.startswith(_HUB):
        return above.removeprefix(_HUB).replace("--", "/", 1)
    return str(resolved)


def _import(hf_dir: Path, save: Path, progress: Progress, name: str) -> BaseInfo:
    with reading("hf", hf_dir):
        weights = WeightsDir(hf_dir)
        config_path = str(hf_dir / "config.json")
        family = family_of(weights.config, config_path)
        args = megatron_args(weights.config, family, config_path)
        config = with_all_ends(weights.config, hf_dir, args["vocab_size"])
        check_token_ids(config, args["vocab_size"], config_path)
        rope = rope_beyond_args({**family.defaults, **weights.config}, config_path)
        check_megatron_args(args, config_path)
        check_complete(args, config_path)
        check_rope(rope, config_path)
        tensors = BaseTensors(family, facts_of(weights.config, family, config_path))
        weights.check(tensors.expected(), tensors.ignored(weights.headers))
        tensors.check_tied(weights)
    if weights.quant_method is not None:
        progress(f"weights are {weights.quant_method}: unpacked as they are read")
    digest = hashlib.sha256()
    chunks = [_digested(chunk, digest) for chunk in tensors.chunks(weights, progress)]

    with atomic_dir(save) as scratch:
        write_torch_dist(scratch / RELEASE, chunks, COMMON_STATE, tensors.extra_states())
        (scratch / TRACKER_NAME).write_text(RELEASE, encoding="utf-8")
        base = BaseInfo(
            family=family.name,
            name=name,
            fingerprint=digest.hexdigest(),
            vocab_size=args["vocab_size"],
            hf_config=config,
            megatron_args=args,
            rope=rope,
        )
        text = json.dumps(base.as_dict(), indent=1)
        (scratch / BASE_JSON_NAME).write_text(text + "\n", encoding="utf-8")
    return base


def _digested(chunk: Chunk, digest: Any) -> Chunk:
    """Return ``chunk``, whose data are added to ``digest`` when they are loaded."""

    def load() -> torch.Tensor:
        tensor = chunk.load().contiguous()
        digest.update(tensor.view(torch.uint8).numpy())
        return tensor

    return replace(chunk, load=load)
