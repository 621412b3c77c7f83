"""A Hugging Face model directory whose weights may be quantized, read as unpacked floats.

The tensors in the files say which weights are packed; ``modules_to_not_convert`` is not needed. The
methods and how they store weights are in ``packed_weights``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.errors import UserError
from megatron_eagle.hf.files.packed_weights import (
    FP4_PER_BYTE,
    MX_BLOCK_BYTES,
    Fp8Weight,
    Mxfp4Weight,
    PackedWeight,
)
from megatron_eagle.hf.files.safetensors_dir import (
    DTYPES,
    SafetensorsDir,
    TensorHeader,
    read_rows,
)

Headers = Mapping[str, TensorHeader]
FP8_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
FLOAT_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


class WeightsDir(SafetensorsDir):
    """A ``SafetensorsDir`` that presents each packed weight as one plain tensor.

    Such a weight has one header, with its unpacked shape and the model's dtype in config.json, and
    ``tensor`` unpacks only the rows asked for. ``config`` lacks ``quantization_config``, of which
    ``quant_method`` is kept. Also raises UserError, naming file or field, for a quantization method
    other than fp8 and mxfp4, and for scales that are missing, misshapen or without a weight.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.quant_method: str | None = None
        self._packed: dict[str, PackedWeight] = {}
        self._stored = dict(self.headers)  # as in the files: packed weights replace their parts
        quantization = self.config.pop("quantization_config", None)
        if quantization is not None:
            self._read_packed(quantization, f"{path / 'config.json'}: quantization_config")

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows [start, stop) of weight ``name`` (all of them by default), on the CPU."""
        packed = self._packed.get(name)
        if packed is None:
            return super().tensor(name, start, stop)
        stop = packed.shape[0] if stop is None else stop
        return packed.read(self._part, start, stop, self.dtype(name))

    def _part(self, name: str, start: int, stop: int | None) -> torch.Tensor:
        return read_rows(self._stored[name], name, start, stop)

    def _read_packed(self, quantization: Any, field: str) -> None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method not in ("fp8", "mxfp4"):
            raise UserError(
                f"{field}.quant_method = {method!r} is not supported, only 'fp8' and 'mxfp4': "
                "bring the weights to bf16 first"
            )
        dtype = self._float_dtype()
        if method == "fp8":
            self._packed = _fp8_weights(self.headers, _block_size(quantization, field))
            self._drop_activation_scales()
        else:
            self._packed = _mxfp4_weights(self.headers)
        for name, packed in self._packed.items():
            file = self.headers[packed.parts[0]].file
            for part in packed.parts:
                del self.headers[part]
            if name in self.headers:
                raise UserError(f"{file}: holds {name} plain and packed")
            self.headers[name] = TensorHeader(file, packed.shape, dtype)
        self.quant_method = method

    def _float_dtype(self) -> str:
        """Return the safetensors name of the model's dtype in config.json, by default bfloat16."""
        dtype = self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"
        if not isinstance(dtype, str) or dtype not in FLOAT_NAMES:
            raise UserError(
                f"{self.path / 'config.json'}: torch_dtype = {dtype!r} is not supported"
            )
        return FLOAT_NAMES[dtype]

    def _drop_activation_scales(self) -> None:
        """Ignore static activation scales, which do not affect the weights."""
        for name in [name for name in self.headers if name.endswith(".activation_scale")]:
            del self.headers[name]


def _block_size(quantization: Mapping[str, Any], field: str) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale; None for one scale per row or weight."""
    if quantization.get("fmt", "e4m3") != "e4m3":
        raise UserError(f"{field}.fmt = {quantization['fmt']!r} is not supported, only 'e4m3'")
    block = quantization.get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list) or [type(n) for n in block] != [int, int] or min(block) < 1:
        raise UserError(f"{field}.weight_block_size must be two positive integers, found {block!r}")
    return block[0], block[1]


def _fp8_weights(headers: Headers, block: tuple[int, int] | None) -> dict[str, PackedWeight]:
    """Return the FP8 weights among ``headers`` by name, their scales checked."""
    packed: dict[str, PackedWeight] = {}
    suffix = "_scale_inv"
    _refuse_lone_scales(headers, suffix, "")
    for name, header in headers.items():
        if header.dtype != "F8_E4M3":
            if name + suffix in headers:
                raise UserError(f"{header.file}: {name} has dtype {header.dtype}, but scales")
            continue
        scale = _partner(headers, name, name + suffix, FP8_SCALES)
        if len(header.shape) != 2:
            raise UserError(f"{header.file}: {name} of shape {list(header.shape)} is no matrix")
        rows, columns = header.shape
        known: dict[tuple[int, ...], tuple[int, int]]  # shape of the scales -> block of each
        if block is not None:
            known = {(-(-rows // block[0]), -(-columns // block[1])): block}
        else:
            whole, per_row = (rows, columns), (1, columns)
            known = {(): whole, (1,): whole, (rows,): per_row, (rows, 1): per_row}
        if scale.shape not in known:
            wanted = " or ".join(str(list(shape)) for shape in known)
            raise UserError(
                f"{scale.file}: {name + suffix} has shape {list(scale.shape)}, but config.json's "
                f"weight_block_size {block and list(block)} implies {wanted}"
            )
        packed[name] = Fp8Weight(name, name + suffix, header.shape, known[scale.shape])
    return packed


def _mxfp4_weights(headers: Headers) -> dict[str, PackedWeight]:
    """Return the MXFP4 weights among ``headers`` by name, their blocks and scales checked."""
    packed: dict[str, PackedWeight] = {}
    ending, suffix = "_blocks", "_scales"
    _refuse_lone_scales(headers, suffix, ending)
    for name, header in headers.items():
        if not name.endswith(ending):
            continue
        stem = name.removesuffix(ending)
        scale = _partner(headers, name, stem + suffix, ("U8",))
        *grid, width = header.shape
        if header.dtype != "U8" or width != MX_BLOCK_BYTES or len(grid) != 3:
            raise UserError(
                f"{header.file}: {name} must be U8 [experts, rows, blocks, {MX_BLOCK_BYTES}], "
                f"found {header.dtype} {list(header.shape)}"
            )
        if scale.shape != tuple(grid):
            raise UserError(
                f"{scale.file}: {stem + suffix} has shape {list(scale.shape)}, "
                f"but {name} implies {grid}"
            )
        experts, out, blocks = grid
        shape = (experts, blocks * width * FP4_PER_BYTE, out)
        packed[stem] = Mxfp4Weight(name, stem + suffix, shape)
    return packed


def _partner(headers: Headers, name: str, scale: str, dtypes: tuple[str, ...]) -> TensorHeader:
    """Return the header of ``scale``, the scales of packed weight ``name``."""
    file = headers[name].file
    if scale not in headers:
        raise UserError(f"{file}: {name} lacks its scales, {scale}")
    header = headers[scale]
    if header.dtype not in dtypes:
        raise UserError(
            f"{header.file}: {scale} has dtype {header.dtype}, not {' or '.join(dtypes)}"
        )
    return header


def _refuse_lone_scales(headers: Headers, suffix: str, ending: str) -> None:
    for name, header in headers.items():
        weight = name.removesuffix(suffix) + ending
        if name.endswith(suffix) and weight not in headers:
            raise UserError(f"{header.file}: {name} scales {weight}, which is missing")
