"""Hidden states as bytes on disk and back: fp32, bf16, or fp8 with a scale per token and layer.

Shapes: n tokens, each a row of ``blocks`` hidden states of ``width`` numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

STORED_DTYPES = ("float32", "bfloat16", "float8")
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0


@dataclass(frozen=True)
class RowCodec:
    """Encoding of rows of ``blocks`` hidden states, ``width`` numbers each, as ``dtype``.

    float8 is e4m3 with one fp32 scale per hidden state, at the end of its row: layers differ by a
    factor of ten in size, first tokens by a factor of a thousand.
    """

    dtype: str
    blocks: int
    width: int

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row on disk."""
        numbers = self.blocks * self.width
        return {"float32": 4, "bfloat16": 2, "float8": 1}[self.dtype] * numbers + self._scale_bytes

    @property
    def _scale_bytes(self) -> int:
        return 4 * self.blocks if self.dtype == "float8" else 0

    def encode(self, rows: Tensor) -> np.ndarray:
        """Encode rows [n, blocks * width] as uint8 [n, row_bytes]; no gradient."""
        rows = rows.detach().cpu()
        if self.dtype != "float8":
            return _as_bytes(rows.to(getattr(torch, self.dtype)))
        blocks = rows.float().unflatten(1, (self.blocks, self.width))
        scales = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / _FP8_MAX
        return np.concatenate(
            [_as_bytes((blocks / scales).flatten(1).to(_FP8)), _as_bytes(scales.flatten(1))], axis=1
        )

    def decode(self, stored: np.ndarray) -> Tensor:
        """Decode uint8 [n, row_bytes] to [n, blocks * width] in fp32 if stored so, else in bf16."""
        data = torch.from_numpy(np.array(stored))  # a copy: memory maps are not writable
        if self.dtype != "float8":
            return data.view(getattr(torch, self.dtype))
        numbers = self.blocks * self.width
        values = data[:, :numbers].contiguous().view(_FP8).float()
        scales = data[:, numbers:].contiguous().view(torch.float32)
        blocks = values.unflatten(1, (self.blocks, self.width)) * scales.unsqueeze(-1)
        return blocks.flatten(1).to(torch.bfloat16)


def _as_bytes(rows: Tensor) -> np.ndarray:
    return rows.contiguous().view(torch.uint8).numpy()
