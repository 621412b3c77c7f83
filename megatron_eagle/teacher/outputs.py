"""BaseOutputs: the base's hidden states for one micro-batch.

Shapes: S' this rank's part of the sequence, B batch, H hidden size, A aux layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BaseOutputs:
    """Inputs of draft and teacher from the base for one micro-batch.

    features [S', B, A * H]: the aux hidden states side by side; without aux layers (EAGLE-1) the
    final hidden. final_hidden [S', B, H]: the base's output, after its final norm.
    """

    features: Tensor
    final_hidden: Tensor

    @classmethod
    def of(cls, aux_hidden: Sequence[Tensor], final_hidden: Tensor) -> BaseOutputs:
        """Concatenate the aux hidden states [S', B, H], given by ascending layer."""
        features = torch.cat(list(aux_hidden), dim=-1) if aux_hidden else final_hidden
        return cls(features, final_hidden)
