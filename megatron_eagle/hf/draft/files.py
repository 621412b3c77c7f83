"""The files of a Hugging Face draft: config.json and tensors, as safetensors or a pickle."""

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
)
from megatron_eagle.user_files import read_json_object

PICKLE_NAME = "pytorch_model.bin"
OTHER_DTYPES = {"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}


@dataclass(frozen=True)
class DraftFiles:
    """Hold config.json, and the shape and dtype of every tensor; ``tensor`` reads one.

    Safetensors are read tensor by tensor; a pickle is in memory from the start.
    """

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    _source: SafetensorsDir | dict[str, Tensor]

    @classmethod
    def open(cls, path: str | Path) -> DraftFiles:
        """Read the headers in directory ``path``.

        Raises ``UserError``, naming the file, for a directory that is missing or incomplete, and
        for a pickle that holds anything but tensors.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"{path}: no such directory")
        has_safetensors = (path / SINGLE_NAME).exists() or (path / INDEX_NAME).exists()
        if (path / PICKLE_NAME).exists() and not has_safetensors:
            return cls._of_pickle(path)
        return cls._of_safetensors(path)

    @classmethod
    def _of_safetensors(cls, path: Path) -> DraftFiles:
        source = SafetensorsDir(path)
        dtypes = DTYPES | OTHER_DTYPES
        for name, header in source.headers.items():
            if header.dtype not in dtypes:
                raise UserError(f"{header.file}: {name} has dtype {header.dtype}")
        headers = source.headers.items()
        return cls(
            path=path,
            config=source.config,
            shapes={name: header.shape for name, header in headers},
            dtypes={name: dtypes[header.dtype] for name, header in headers},
            _source=source,
        )

    @classmethod
    def _of_pickle(cls, path: Path) -> DraftFiles:
        config, file = read_json_object(path / "config.json"), path / PICKLE_NAME
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
            path=path,
            config=config,
            shapes={name: tuple(value.shape) for name, value in content.items()},
            dtypes={name: value.dtype for name, value in content.items()},
            _source=content,
        )

    def tensor(self, name: str, rows: int | None = None) -> Tensor:
        """Return a tensor on the CPU, or its first ``rows`` rows."""
        source = self._source
        return source[name][:rows] if isinstance(source, dict) else source.tensor(name, 0, rows)
