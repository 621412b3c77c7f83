"""A Hugging Face base -> a Megatron `torch_dist` checkpoint that loads at any TP and PP.

`base_chunks` names the global tensors. Vocabulary rows are unpadded: Megatron's vocabulary tensors
accept a shorter one and fill zeros.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.checkpoint.atomic import atomic_dir, check_unused
from megatron_eagle.checkpoint.directory import BASE_JSON_NAME, TRACKER_NAME, BaseInfo
from megatron_eagle.checkpoint.writer import Chunk, write_torch_dist
from megatron_eagle.hf.base.chunks import BaseTensors, Progress
from megatron_eagle.hf.base.families import family_of
from megatron_eagle.hf.base.megatron_args import facts_of, megatron_args
from megatron_eagle.hf.files.weights_dir import WeightsDir
from megatron_eagle.hf.tables.rope import rope_beyond_flags

RELEASE = "release"
# Without the version Megatron's own --load takes the file for a 2019 one and permutes linear_qkv.
COMMON_STATE = {"checkpoint_version": 3.0, "iteration": 0}


def import_base(hf_dir: Path, save: Path, progress: Progress = lambda line: None) -> BaseInfo:
    """Write checkpoint directory `save` from the model in `hf_dir`; returns its description.

    Everything is checked from headers before the first byte is written; `save` appears by rename
    when complete. ValueError for an unsupported or corrupt `hf_dir`, or a `save` that is in use.
    """
    check_unused(save, "save")
    source = WeightsDir(hf_dir)
    config_name = str(hf_dir / "config.json")
    family = family_of(source.config, config_name)
    args = megatron_args(source.config, family, config_name)
    rope = rope_beyond_flags({**family.defaults, **source.config}, config_name)
    tensors = BaseTensors(family, facts_of(source.config, family, config_name))
    source.check(tensors.expected(), tensors.ignored(source.headers))
    if source.quant_method is not None:
        progress(f"weights are {source.quant_method}: unpacked as they are read")
    digest = hashlib.sha256()
    chunks = [_digested(chunk, digest) for chunk in tensors.chunks(source, progress)]

    with atomic_dir(save) as scratch:
        write_torch_dist(scratch / RELEASE, chunks, COMMON_STATE, tensors.extra_states())
        (scratch / TRACKER_NAME).write_text(RELEASE, encoding="utf-8")
        base = BaseInfo(
            family.name, hf_dir.resolve().name, digest.hexdigest(), args["vocab_size"],
            source.config, args, rope,
        )  # fmt: skip
        text = json.dumps(base.as_dict(), indent=1)
        (scratch / BASE_JSON_NAME).write_text(text + "\n", encoding="utf-8")
    return base


def _digested(chunk: Chunk, digest: Any) -> Chunk:
    """`chunk`, whose data go into `digest` as they are loaded."""

    def load() -> torch.Tensor:
        tensor = chunk.load().contiguous()
        digest.update(tensor.view(torch.uint8).numpy())
        return tensor

    return replace(chunk, load=load)
