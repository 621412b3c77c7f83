"""Put a trained next-token module back into a copy of its base's Hugging Face files.

The module's tensors have the names, shapes and places of those that they replace, so the copy's
headers, index and other tensors stay as they are, byte for byte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from megatron_eagle.checkpoint.atomic import atomic_dir, check_unused, owned_output
from megatron_eagle.errors import UserError, literal
from megatron_eagle.hf.files.safetensors_dir import DTYPES, SafetensorsDir
from megatron_eagle.user_files import reading

MARK = "megatron_eagle_module"
"""Field of config.json by which a directory is known to hold a module alone."""

_LEFT_OUT = shutil.ignore_patterns(".git*", ".cache")
_MAY_DIFFER = {MARK, "torch_dtype", "dtype", "eos_token_id", "transformers_version"}


def stitch(hf: Path, module: Path, save: Path, progress: Callable[[str], None]) -> int:
    """Write directory ``save``, a copy of the base in ``hf`` with the tensors of ``module``; return
    how many they are.

    ``save`` appears by a rename when it is complete. Memory: the largest tensor. Raises
    ``UserError`` for a module of another base, for tensors that the base's files have not, in
    another shape or quantized, and for a ``save`` in use.
    """
    with owned_output(save, "save") as was_killed:
        if not was_killed:
            check_unused(save, "save")
        with reading("hf", hf):
            base = SafetensorsDir(hf)
        with reading("module", module):
            trained = SafetensorsDir(module)
            _check(base, trained)
        with atomic_dir(save, was_killed=was_killed) as scratch:
            progress(f"copying {hf}")
            shutil.copytree(hf, scratch, dirs_exist_ok=True, ignore=_LEFT_OUT)
            for file in sorted({base.headers[name].file.name for name in trained.headers}):
                names = [name for name in trained.headers if base.headers[name].file.name == file]
                progress(f"putting {len(names)} tensors into {file}")
                _replace(scratch / file, names, base, trained)
    return len(trained.headers)


def _check(base: SafetensorsDir, trained: SafetensorsDir) -> None:
    """Raise ``UserError`` unless every tensor of ``trained`` has its place in ``base``, and the
    base is the one that it was trained for."""
    mark = trained.config.get(MARK)
    if not isinstance(mark, dict) or not isinstance(mark.get("prefix"), str):
        raise UserError(
            f"{trained.path / 'config.json'}: not of a converted next-token module ({MARK})"
        )
    _check_config(base, trained)
    for name, header in trained.headers.items():
        if name not in base.headers:
            raise UserError(f"{base.path}: has no {name}, so there is no place for the module")
        place = base.headers[name]
        if place.dtype not in DTYPES:
            raise UserError(
                f"{literal(place.file)}: {name} is {place.dtype}, quantized; bring the base's "
                "weights to bf16 first"
            )
        if place.shape != header.shape:
            raise UserError(
                f"{literal(header.file)}: {name} has shape {list(header.shape)}, the base's "
                f"{list(place.shape)}"
            )
    copies = {"embed_tokens.weight", "shared_head.head.weight"}
    inside = {name for name in base.headers if name.startswith(mark["prefix"])}
    missing = sorted(
        name
        for name in inside - set(trained.headers)
        if name.removeprefix(mark["prefix"]) not in copies and "inv_freq" not in name
    )
    if missing:
        raise UserError(f"{trained.path}: lacks {missing[0]}, which the base's module has")


def _check_config(base: SafetensorsDir, trained: SafetensorsDir) -> None:
    """Raise ``UserError`` for the first field in which the two configurations differ."""
    for name in sorted(set(base.config) & set(trained.config) - _MAY_DIFFER):
        if base.config[name] != trained.config[name]:
            raise UserError(
                f"{trained.path / 'config.json'}: {name} is {literal(trained.config[name])}, the "
                f"base's {literal(base.config[name])}: the module is another base's"
            )


def _replace(file: Path, names: Iterable[str], base: SafetensorsDir, to: SafetensorsDir) -> None:
    """Overwrite the tensors ``names`` in the safetensors ``file`` with those of ``to``."""
    with open(file, "r+b") as shard:
        size = int.from_bytes(shard.read(8), "little")
        places = json.loads(shard.read(size))
        for name in names:
            dtype = base.dtype(name)
            tensor = to.tensor(name).to(dtype).contiguous()
            if not tensor.isfinite().all():
                raise UserError(f"<module> {literal(to.path)}: {name} overflows in {dtype}")
            stored = base.headers[name].stored or name
            begin, end = places[stored]["data_offsets"]
            content = tensor.view(torch.uint8).numpy().tobytes()
            assert len(content) == end - begin, name
            shard.seek(8 + size + begin)
            shard.write(content)
