"""Quantized weights, stored as low-bit floats with scales, and how to unpack them.

FP8 as DeepSeek-V3 ships it: ``X.weight`` of 8-bit floats and ``X.weight_scale_inv``, one factor per
block of 128 x 128 (or per row, or one for all). MXFP4 as gpt-oss ships it (OCP Microscaling 1.0):
``X_blocks``, two 4-bit floats a byte, the lower half first; 32 consecutive ones share an exponent
in ``X_scales``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_PER_BYTE, MX_BLOCK_BYTES = 2, 16
BAND = 128
"""Rows of an FP8 weight that are unpacked at a time: only these are in memory as fp32."""

Load = Callable[[str, int, int | None], Tensor]
"""(name, start, stop) -> rows [start, stop) of a stored tensor."""


class PackedWeight(Protocol):
    """One weight that several stored tensors represent together."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the unpacked weight."""
        ...

    @property
    def parts(self) -> tuple[str, str]:
        """The names of the stored tensors."""
        ...

    def read(self, load: Load, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows [start, stop) of the weight; load no more of the parts than they need."""
        ...


@dataclass(frozen=True)
class Fp8Weight:
    """``weight`` [rows, columns] float8_e4m3fn times ``scale``, one factor per ``block``."""

    weight: str
    scale: str
    shape: tuple[int, ...]
    block: tuple[int, int]

    @property
    def parts(self) -> tuple[str, str]:
        """The names of the stored tensors."""
        return self.weight, self.scale

    def read(self, load: Load, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return [stop - start, columns]: products in fp32, rounded once to ``dtype``."""
        packed = load(self.weight, start, stop)
        first = start // self.block[0]
        scale = load(self.scale, first, -(-stop // self.block[0])).float()
        scale = scale.reshape(scale.shape[0] if scale.ndim else 1, -1)
        rows = torch.arange(start, stop) // self.block[0] - first
        out = torch.empty(packed.shape, dtype=dtype)
        for band in torch.arange(stop - start).split(BAND):
            a, b = int(band[0]), int(band[-1]) + 1
            per_column = scale[rows[a:b]].repeat_interleave(self.block[1], dim=1)
            out[a:b] = packed[a:b].float() * per_column[:, : self.shape[1]]
        return out


@dataclass(frozen=True)
class Mxfp4Weight:
    """Matrices [experts, in, out] that two tensors represent with ``in`` last.

    ``blocks`` is uint8 [experts, out, in / 32, 16], ``scales`` uint8 [experts, out, in / 32].
    """

    blocks: str
    scales: str
    shape: tuple[int, ...]

    @property
    def parts(self) -> tuple[str, str]:
        """The names of the stored tensors."""
        return self.blocks, self.scales

    def read(self, load: Load, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return [stop - start, in, out], a transposed view."""
        blocks, scales = load(self.blocks, start, stop), load(self.scales, start, stop)
        values = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)])
        pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)  # by byte
        out = torch.empty(stop - start, *reversed(self.shape[1:]), dtype=dtype)
        for expert, rows in enumerate(out):
            unpacked = pairs[blocks[expert].flatten().int()].view(*scales[expert].shape, -1)
            exponents = scales[expert].view(torch.float8_e8m0fnu).float()
            rows.copy_((unpacked * exponents.unsqueeze(-1)).flatten(1))
        return out.transpose(1, 2)
