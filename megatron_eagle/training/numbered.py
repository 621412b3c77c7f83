"""Samples that know their number, by which a block draft draws its anchors."""

from __future__ import annotations

from typing import Any

import torch

SAMPLE = "sample"
"""Key of a sample's number."""


class NumberedSamples(torch.utils.data.Dataset):
    """A Megatron data set whose samples hold their index in it.

    With Megatron's sampler that is the number of samples consumed before: every rank, every layout
    and a resumed run see the same one.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        for name in ("split", "index_split"):  # Megatron's loader asks for them
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))

    @classmethod
    def of(cls, dataset: Any) -> NumberedSamples | None:
        """Wrap ``dataset``, if there is one."""
        return None if dataset is None else cls(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], SAMPLE: int(index)}
