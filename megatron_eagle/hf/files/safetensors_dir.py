"""A Hugging Face model directory of safetensors, read strictly and lazily.

Only headers are read when the directory is opened. A tensor's bytes are read on demand and its file
is closed again, so that memory holds the tensors in use alone. Pickles are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_eagle.errors import UserError, literal
from megatron_eagle.hf.files.text_part import TextPart, text_part_of
from megatron_eagle.user_files import first_line, read_json_object, reading_file

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class TensorHeader:
    """The file of one tensor and what its header says; ``dtype`` is safetensors' name of it.
    ``stored``: the tensor's name in the file, if it is another."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    stored: str | None = None


class SafetensorsDir:
    """One model directory: ``config`` (config.json) and ``headers`` (tensor name -> header). Of a
    multimodal model both are those of its language model alone.

    Raises UserError, naming the file, for: no directory or config.json, a truncated or malformed
    file, an index that disagrees with its files, or weights that exist only as pickles.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(f"{path}: no such directory")
        self.path = path
        self.config = read_json_object(path / "config.json")
        index = path / INDEX_NAME
        if index.exists():
            self.headers = _indexed_headers(index)
        elif (path / SINGLE_NAME).exists():
            self.headers = _file_headers(path / SINGLE_NAME)
        else:
            raise UserError(_no_weights(path))
        if (part := text_part_of(self.config)) is not None:
            self.config = part.config(self.config, str(path / "config.json"))
            self.headers = _text_headers(self.headers, part)

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: set[str]) -> None:
        """Check that the directory holds the ``expected`` names -> shapes, as floats, and no more.

        Names in ``ignored`` may be present or not. Raises UserError for the first disagreement.
        """
        _refuse_names(self.path, "is missing", set(expected) - set(self.headers))
        unknown = set(self.headers) - set(expected) - ignored
        _refuse_names(self.path, "has unknown", unknown)
        for name, shape in expected.items():
            header = self.headers[name]
            if header.shape != shape:
                raise UserError(
                    f"{header.file}: {name} has shape {list(header.shape)}, "
                    f"but config.json implies {list(shape)}"
                )
            if header.dtype not in DTYPES:
                raise UserError(
                    f"{header.file}: {name} has dtype {header.dtype}; only "
                    f"{', '.join(DTYPES)} weights can be imported"
                )

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of tensor ``name``, which ``check`` has accepted."""
        return DTYPES[self.headers[name].dtype]

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows [start, stop) of tensor ``name`` (all of them by default), on the CPU."""
        return read_rows(self.headers[name], name, start, stop)


def _text_headers(headers: Mapping[str, TensorHeader], part: TextPart) -> dict[str, TensorHeader]:
    """Return the headers of a multimodal model's language model, under the names it has alone."""
    found: dict[str, TensorHeader] = {}
    for stored, header in headers.items():
        name = part.name(stored)
        if name in found:
            raise UserError(f"{header.file}: {stored} is {found[name].stored} too")
        if name is not None:
            found[name] = replace(header, stored=stored)
    return found


def read_rows(header: TensorHeader, name: str, start: int, stop: int | None) -> torch.Tensor:
    """Return rows [start, stop), or to the end, of tensor ``name``; a scalar is returned whole."""
    with reading_file(header.file), safe_open(header.file, framework="pt") as file:
        stored = header.stored or name
        if not header.shape:
            return file.get_tensor(stored)
        return file.get_slice(stored)[start : header.shape[0] if stop is None else stop]


def _file_headers(path: Path) -> dict[str, TensorHeader]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorHeader(path, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except Exception as error:  # headers can be damaged in any way
        raise UserError(
            f"{literal(path)}: truncated or not a safetensors file ({literal(first_line(error))})"
        ) from None


def _indexed_headers(index: Path) -> dict[str, TensorHeader]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise UserError(f"{index}: weight_map must map tensor names to files beside it")
    headers: dict[str, TensorHeader] = {}
    for name in sorted(set(weight_map.values())):
        path = index.parent / name
        if not path.exists():
            raise UserError(f"{index}: names {name}, which is not in the directory")
        for tensor, header in _file_headers(path).items():
            if weight_map.get(tensor) != name:
                raise UserError(f"{path}: holds {tensor}, which the index does not place there")
            headers[tensor] = header
    _refuse_names(index, "names, but its files lack,", set(weight_map) - set(headers))
    return headers


def _no_weights(path: Path) -> str:
    pickles = sorted(
        file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern)
    )
    if pickles:
        return (
            f"{path}: weights are pickles ({pickles[0]}), which are never loaded; "
            "convert them to safetensors first"
        )
    return f"{path}: neither {SINGLE_NAME} nor {INDEX_NAME} is there"


def _refuse_names(path: Path, verb: str, names: set[str]) -> None:
    if names:
        listed = sorted(names)
        more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
        raise UserError(f"{path}: {verb} tensor {', '.join(listed[:3])}{more}")
