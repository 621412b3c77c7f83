"""The files of somebody's draft: config.json and its tensors, safetensors or a plain pickle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.errors import UserError
from megatron_eagle.hf.files.safetensors_dir import (
    DTYPES,
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsDir,
    read_json,
)

PICKLE_NAME = "pytorch_model.bin"
OTHER_DTYPES = {"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}


@dataclass(frozen=True)
class DraftFiles:
    """`shapes` and `dtypes` of every tensor; `tensor` reads one (of safetensors, only then)."""

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    _source: SafetensorsDir | dict[str, Tensor]

    @classmethod
    def open(cls, path: str | Path) -> DraftFiles:
        """Raises ValueError, naming the file, for a directory that is not there or not whole, and
        for a pickle that holds anything but tensors."""
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"{path}: no such directory")
        pickled = path / PICKLE_NAME
        safe = (path / SINGLE_NAME).exists() or (path / INDEX_NAME).exists()
        return cls._of_pickle(path, pickled) if pickled.exists() and not safe else cls._of(path)

    @classmethod
    def _of(cls, path: Path) -> DraftFiles:
        source = SafetensorsDir(path)
        known = DTYPES | OTHER_DTYPES
        for name, header in source.headers.items():
            if header.dtype not in known:
                raise UserError(f"{header.file}: {name} has dtype {header.dtype}")
        headers = source.headers.items()
        return cls(
            path,
            source.config,
            {name: header.shape for name, header in headers},
            {name: known[header.dtype] for name, header in headers},
            source,
        )

    @classmethod
    def _of_pickle(cls, path: Path, file: Path) -> DraftFiles:
        config = read_json(path / "config.json")
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and tensor decoding each fail in their own way
            raise UserError(
                f"{file}: truncated, or a pickle of more than tensors, which is never loaded"
            ) from error
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
        ):
            raise UserError(f"{file}: does not hold tensors by name")
        return cls(
            path,
            config,
            {name: tuple(value.shape) for name, value in content.items()},
            {name: value.dtype for name, value in content.items()},
            content,
        )

    def tensor(self, name: str, rows: int | None = None) -> Tensor:
        """The tensor on the CPU, or its first ``rows``."""
        source = self._source
        return source[name][:rows] if isinstance(source, dict) else source.tensor(name, 0, rows)
