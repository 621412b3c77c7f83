"""Hold the sums over a micro-batch's target positions that the training metrics are made of."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor


class LossSums(NamedTuple):
    """Sums over a micro-batch's target positions: fp32 [K] for K TTT steps, or a scalar.

    ``pack`` and ``unpack`` convert to and from one vector [3 K + 2], so that the sums of chunks add
    up in one operation.
    """

    loss: Tensor
    """[K]: the loss, not weighted by step."""
    rows: Tensor
    """[K]: supervised positions."""
    hits: Tensor
    """[K]: supervised positions whose draft argmax is the base's."""
    coverage: Tensor
    """Scalar: the base's probability inside the draft vocabulary, over ``coverage_rows``."""
    coverage_rows: Tensor
    """Scalar: target positions of TTT step 0."""

    def pack(self) -> Tensor:
        """Return the vector [3 K + 2]."""
        per_step, scalars = torch.stack(self[:3]), torch.stack(self[3:])
        return torch.cat([per_step.flatten(), scalars])

    @classmethod
    def unpack(cls, packed: Tensor) -> Self:
        """Return the fields of a vector [3 K + 2], as views."""
        return cls(*packed[:-2].view(3, -1), *packed[-2:])
