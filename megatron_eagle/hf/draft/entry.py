"""A row of the name table of a draft: a Megatron tensor, and the Hugging Face tensors in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_eagle.hf.tables.entries import Dims, Source, join_rows

Split = Callable[[Tensor, Sequence[Source], Dims], list[Tensor]]
Join = Callable[[Sequence[Tensor], Dims], Tensor]


@dataclass(frozen=True)
class DraftEntry:
    """One row of the table: a Megatron tensor and the Hugging Face tensors in it.

    Attributes:
        megatron: name of the tensor in the checkpoint.
        shape: its shape in symbols.
        sources: the Hugging Face tensors.
        split: cuts the Megatron tensor into ``sources``, in their order (export).
        join: makes the Megatron tensor from ``sources`` (import).
        padded: the stored tensor may have more rows than ``shape``; the last ones are padding.
    """

    megatron: str
    shape: tuple[str, ...]
    sources: tuple[Source, ...]
    split: Split
    join: Join
    padded: bool = False

    def sizes(self, dims: Dims) -> tuple[int, ...]:
        """Return the shape in numbers, without padding."""
        return Source(self.megatron, self.shape).sizes(dims)

    def accepts(self, shape: tuple[int, ...], dims: Dims) -> bool:
        """Return whether a stored tensor may have this shape."""
        rows, *columns = self.sizes(dims)
        has_padding = self.padded and len(shape) > 0 and shape[0] > rows
        return shape == (shape[0] if has_padding else rows, *columns)

    def named(self, megatron_prefix: str, hf_prefix: str) -> DraftEntry:
        """Return the same entry with a prefix in front of the names of each side."""
        sources = tuple(replace(part, name=hf_prefix + part.name) for part in self.sources)
        return replace(self, megatron=megatron_prefix + self.megatron, sources=sources)


def split_rows(tensor: Tensor, sources: Sequence[Source], dims: Dims) -> list[Tensor]:
    """Cut a tensor whose rows are those of the sources, one after another, then padding."""
    rows = [part.sizes(dims)[0] for part in sources]
    return list(tensor[: sum(rows)].split(rows))


def split_query_groups(tensor: Tensor, sources: Sequence[Source], dims: Dims) -> list[Tensor]:
    """Sort rows [q_1 .. q_r, k, v] of each query group into q [Q, N], k [KV, N] and v [KV, N]."""
    rows = [part.sizes(dims)[0] // dims["groups"] for part in sources]
    grouped = tensor.unflatten(0, (dims["groups"], -1))
    return [part.flatten(0, 1) for part in grouped.split(rows, dim=1)]


def repeat(tensor: Tensor, sources: Sequence[Source], dims: Dims) -> list[Tensor]:
    """Return the whole tensor for every source."""
    return [tensor] * len(sources)


def first(parts: Sequence[Tensor], dims: Dims) -> Tensor:
    """Return the first of equal tensors, the inverse of ``repeat``."""
    return parts[0]


def one_entry(megatron: str, name: str, *shape: str, padded: bool = False) -> DraftEntry:
    """Return the entry of a tensor that is the same on both sides."""
    return DraftEntry(
        megatron=megatron,
        shape=shape,
        sources=(Source(name, shape),),
        split=split_rows,
        join=join_rows,
        padded=padded,
    )
