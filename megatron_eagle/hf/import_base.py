"""A Hugging Face base -> a Megatron `torch_dist` checkpoint that loads at any TP and PP.

Global tensors are written as GPTModel.sharded_state_dict() names them: layers stacked on a leading
axis, vocabulary rows unpadded (Megatron's vocabulary tensors accept a shorter one and fill zeros).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.checkpoint_dir import BASE_JSON_NAME, TRACKER_NAME, BaseInfo
from megatron_eagle.hf.families import OUTPUT, Dims, Entry, Family, family_of
from megatron_eagle.hf.megatron_args import dims_of, megatron_args
from megatron_eagle.hf.safetensors_dir import SafetensorsDir
from megatron_eagle.hf.torch_dist_writer import Chunk, write_torch_dist

RELEASE = "release"
CHUNK_BYTES = 64 * 2**20
# Without the version Megatron's own --load takes the file for a 2019 one and permutes linear_qkv.
COMMON_STATE = {"checkpoint_version": 3.0, "iteration": 0}
# Megatron's linear layers ask for an (empty) extra state when a checkpoint is loaded strictly.
LINEAR_LAYERS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)

Progress = Callable[[str], None]


def import_base(hf_dir: Path, save: Path, progress: Progress = lambda line: None) -> BaseInfo:
    """Write checkpoint directory `save` from the model in `hf_dir`; returns its description.

    Everything is checked from headers before the first byte is written; `save` appears by rename
    when complete. ValueError for an unsupported or corrupt `hf_dir`, or a `save` that is in use.
    """
    _refuse_in_use(save)
    source = SafetensorsDir(hf_dir)
    config_name = str(hf_dir / "config.json")
    family = family_of(source.config, config_name)
    args = megatron_args(source.config, family, config_name)
    tied = not args["untie_embeddings_and_output_weights"]
    dims, layers = dims_of(args), args["num_layers"]
    source.check(expected_tensors(family, dims, layers, tied), _ignored(family, layers, tied))
    digest = hashlib.sha256()
    chunks = [
        _digested(chunk, digest) for chunk in _chunks(source, family, dims, layers, tied, progress)
    ]

    partial_dir = save.parent / f".{save.name}.partial-{os.getpid()}"
    try:
        partial_dir.mkdir(parents=True)
        write_torch_dist(partial_dir / RELEASE, chunks, COMMON_STATE, _extra_states(layers))
        (partial_dir / TRACKER_NAME).write_text(RELEASE, encoding="utf-8")
        base = BaseInfo(
            family.name, hf_dir.resolve().name, digest.hexdigest(), args["vocab_size"],
            source.config, args,
        )  # fmt: skip
        text = json.dumps(base.as_dict(), indent=1)
        (partial_dir / BASE_JSON_NAME).write_text(text + "\n", encoding="utf-8")
        partial_dir.rename(save)
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)
    return base


def expected_tensors(
    family: Family, dims: Dims, layers: int, tied: bool
) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor names -> shapes that a complete directory holds."""
    named = [("", entry) for entry in family.model if not (tied and entry is OUTPUT)]
    for layer in range(layers):
        named += [(family.layer_prefix.format(layer), entry) for entry in family.layer]
    return {
        prefix + source.name: source.sizes(dims)
        for prefix, entry in named
        for source in entry.sources
    }


def _ignored(family: Family, layers: int, tied: bool) -> set[str]:
    """Tensors that may be there and carry nothing: the tied head's copy, old rope buffers."""
    names = {
        family.layer_prefix.format(layer) + name
        for layer in range(layers)
        for name in family.ignored_in_layer
    }
    return names | ({source.name for source in OUTPUT.sources} if tied else set())


def _extra_states(layers: int) -> dict[str, None]:
    return {
        f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}": None
        for module in LINEAR_LAYERS
        for layer in range(layers)
    }


def _digested(chunk: Chunk, digest: Any) -> Chunk:
    """`chunk`, whose data go into `digest` as they are loaded."""

    def load() -> torch.Tensor:
        tensor = chunk.load().contiguous()
        digest.update(tensor.view(torch.uint8).numpy())
        return tensor

    return replace(chunk, load=load)


def _chunks(
    source: SafetensorsDir,
    family: Family,
    dims: Dims,
    layers: int,
    tied: bool,
    progress: Progress,
) -> Iterator[Chunk]:
    for layer in range(layers):
        line = f"layer {layer + 1}/{layers}"
        for position, entry in enumerate(family.layer):
            announce = partial(progress, line) if position == 0 else None
            yield _layer_chunk(source, family, entry, dims, layer, layers, announce)
    for entry in family.model:
        if not (tied and entry is OUTPUT):
            yield from _row_chunks(source, entry, dims, partial(progress, entry.megatron))


def _layer_chunk(
    source: SafetensorsDir,
    family: Family,
    entry: Entry,
    dims: Dims,
    layer: int,
    layers: int,
    announce: Callable[[], None] | None,
) -> Chunk:
    names = [family.layer_prefix.format(layer) + part.name for part in entry.sources]
    dtype = _common_dtype(source, names)
    shape = entry.sizes(dims)

    def load() -> torch.Tensor:
        if announce is not None:
            announce()
        joined = entry.join([source.tensor(name) for name in names], dims)
        return joined.unsqueeze(0)

    return Chunk(
        f"decoder.layers.{entry.megatron}",
        (layers, *shape),
        (layer,) + (0,) * len(shape),
        (1, *shape),
        dtype,
        load,
    )


def _row_chunks(
    source: SafetensorsDir, entry: Entry, dims: Dims, announce: Callable[[], None]
) -> Iterator[Chunk]:
    """One tensor in blocks of rows: a tensor-parallel rank reads only the blocks it needs."""
    (part,) = entry.sources
    shape = entry.sizes(dims)
    dtype = source.dtype(part.name)
    rows = max(1, CHUNK_BYTES // (dtype.itemsize * math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])

        def load(start: int = start, stop: int = stop) -> torch.Tensor:
            if start == 0:
                announce()
            return source.tensor(part.name, start, stop)

        offset = (start,) + (0,) * (len(shape) - 1)
        yield Chunk(entry.megatron, shape, offset, (stop - start, *shape[1:]), dtype, load)


def _common_dtype(source: SafetensorsDir, names: list[str]) -> torch.dtype:
    dtypes = {source.dtype(name) for name in names}
    if len(dtypes) > 1:
        raise ValueError(f"{source.path}: {', '.join(names)} differ in dtype")
    return dtypes.pop()


def _refuse_in_use(save: Path) -> None:
    if save.is_symlink() or (save.exists() and not save.is_dir()):
        raise ValueError(f"--save {save}: exists and is not a directory")
    if save.is_dir() and any(save.iterdir()):
        raise ValueError(f"--save {save}: the directory exists and is not empty")
