"""BaseOutputs: what the draft and the teacher read of the base for one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BaseOutputs:
    """What the draft needs of the base for one micro-batch: features, the captured layers
    [S', B, A * H] or, if none are (EAGLE-1), the final hidden; and the final hidden [S', B, H]."""

    features: Tensor
    final_hidden: Tensor

    @classmethod
    def of(cls, captured: Sequence[Tensor], final_hidden: Tensor) -> BaseOutputs:
        """From the captured layers, ascending."""
        features = torch.cat(list(captured), dim=-1) if captured else final_hidden
        return cls(features, final_hidden)
