"""The Megatron tensors of a base, block by block, each read from its Hugging Face directory when
it is written.

Names and shapes are those of GPTModel.sharded_state_dict() with Transformer Engine's layers, which
local layers also ask for: norms that TE fuses into a linear layer carry that layer's name. Layers
are stacked on a leading axis, except where the layers differ in kind: then Megatron numbers them.
Experts are stacked on the next axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_eagle.checkpoint.writer import Chunk
from megatron_eagle.hf.base.families import LAYER_PREFIX, Family
from megatron_eagle.hf.base.megatron_args import dims_of
from megatron_eagle.hf.base.moe_args import moe_layers
from megatron_eagle.hf.files.safetensors_dir import SafetensorsDir
from megatron_eagle.hf.tables.entries import Dims, Entry, Source

CHUNK_BYTES = 64 * 2**20
Progress = Callable[[str], None]
Axes = tuple[tuple[int, int], ...]
"""The leading axes of a stacked tensor, as (index, size)."""


@dataclass(frozen=True)
class BaseTensors:
    """The tensors of one base of `family`; `facts` as `facts_of` gives them."""

    family: Family
    facts: Mapping[str, Any]

    @property
    def dims(self) -> Dims:
        """The symbols of the name tables in numbers."""
        return dims_of(self.facts)

    @property
    def layers(self) -> list[list[Entry]]:
        """The rows of every layer."""
        return [self.family.layer(self.facts, moe) for moe in moe_layers(self.facts)]

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face tensor names -> shapes that a complete directory holds."""
        dims, facts = self.dims, self.facts
        named = [("", entry) for entry in self.family.once(facts)]
        for layer, entries in enumerate(self.layers):
            named += [(LAYER_PREFIX.format(layer), entry) for entry in entries]
        return {
            prefix + source.name.format(expert): source.sizes(dims)
            for prefix, entry in named
            for source in entry.read_from(facts)
            for expert in range(dims["E"] if "{}" in source.name else 1)
        }

    def ignored(self, present: Iterable[str]) -> set[str]:
        """Tensors that may be there and are not wanted: the tied head's copy, old rope buffers, and
        of those ``present`` the layers that predict further tokens."""
        names = {
            LAYER_PREFIX.format(layer) + name
            for layer in range(len(self.layers))
            for name in self.family.ignored_in_layer
        }
        absent = [entry for entry in self.family.model if not entry.exists(self.facts)]
        first = len(self.layers)
        further = range(first, first + self.facts["mtp_layers"])
        prefixes = tuple(LAYER_PREFIX.format(layer) for layer in further)
        names |= {name for name in present if name.startswith(prefixes)}
        return names | {source.name for entry in absent for source in entry.sources}

    def chunks(self, source: SafetensorsDir, progress: Progress) -> Iterator[Chunk]:
        """Every block, in writing order; layers first."""
        for layer, entries in enumerate(self.layers):
            line = f"layer {layer + 1}/{len(self.layers)}"
            for position, entry in enumerate(entries):
                announce = partial(progress, line) if position == 0 else _quietly
                yield from self._layer_chunks(source, entry, layer, announce)
        for entry in self.family.once(self.facts):
            yield from self._row_chunks(source, entry, partial(progress, entry.megatron))

    def extra_states(self) -> dict[str, None]:
        """Megatron's linear layers ask for an (empty) extra state when loaded strictly."""
        states: dict[str, None] = {}
        for layer, entries in enumerate(self.layers):
            for entry in entries:
                module, _, parameter = entry.megatron.rpartition(".")
                if parameter != "weight" or not module.rpartition(".")[2].startswith("linear_"):
                    continue
                for expert in range(self.dims["E"] if entry.per_expert else 1):
                    prefix, axes = self._place(entry, layer, expert)
                    index, sizes = zip(*(axes or ((0, 1),)), strict=True)
                    shard = f"shard_{_dotted(index)}_{_dotted(sizes)}"
                    states[f"{prefix}{module}._extra_state/{shard}"] = None
        return states

    def _place(self, entry: Entry, layer: int, expert: int) -> tuple[str, Axes]:
        """Prefix of the key, and the leading axes, of one layer's (and expert's) part."""
        numbered = "moe_layer_freq" in self.facts
        prefix = f"decoder.layers.{layer}." if numbered else "decoder.layers."
        axes: Axes = () if numbered else ((layer, len(self.layers)),)
        return prefix, axes + (((expert, self.dims["E"]),) if entry.per_expert else ())

    def _layer_chunks(
        self, source: SafetensorsDir, entry: Entry, layer: int, announce: Callable[[], None]
    ) -> Iterator[Chunk]:
        dims, shape = self.dims, entry.sizes(self.dims)
        for expert in range(dims["E"] if entry.per_expert else 1):
            prefix, axes = self._place(entry, layer, expert)
            parts = [
                (part, LAYER_PREFIX.format(layer) + part.name.format(expert))
                for part in entry.read_from(self.facts)
            ]
            dtype = _common_dtype(source, [name for _, name in parts]) if parts else None
            ones = (1,) * len(axes)

            def load(
                parts: Sequence[tuple[Source, str]] = parts,
                expert: int = expert,
                ones: tuple[int, ...] = ones,
            ) -> torch.Tensor:
                if expert == 0:
                    announce()
                if not parts:
                    return torch.zeros(ones + shape, dtype=_first_dtype(source))
                read = [
                    _read(source, *part, expert if entry.per_expert else None) for part in parts
                ]
                joined = entry.join(read, dims)
                return joined.reshape(ones + shape)

            yield Chunk(
                prefix + entry.megatron,
                tuple(size for _, size in axes) + shape,
                tuple(index for index, _ in axes) + (0,) * len(shape),
                ones + shape,
                dtype or _first_dtype(source),
                load,
            )

    def _row_chunks(
        self, source: SafetensorsDir, entry: Entry, announce: Callable[[], None]
    ) -> Iterator[Chunk]:
        """One tensor in blocks of rows: a tensor-parallel rank reads only the blocks it needs."""
        (part,) = entry.sources
        shape = entry.sizes(self.dims)
        dtype = source.dtype(part.name)
        rows = max(1, CHUNK_BYTES // (dtype.itemsize * math.prod(shape[1:])))
        for start in range(0, shape[0], rows):
            stop = min(start + rows, shape[0])

            def load(start: int = start, stop: int = stop) -> torch.Tensor:
                if start == 0:
                    announce()
                return source.tensor(part.name, start, stop)

            offset = (start,) + (0,) * (len(shape) - 1)
            yield Chunk(entry.megatron, shape, offset, (stop - start, *shape[1:]), dtype, load)


def _read(source: SafetensorsDir, part: Source, name: str, expert: int | None) -> torch.Tensor:
    if expert is not None and part.stacked:
        return source.tensor(name, expert, expert + 1)[0]
    return source.tensor(name)


def _common_dtype(source: SafetensorsDir, names: list[str]) -> torch.dtype:
    dtypes = {source.dtype(name) for name in names}
    if len(dtypes) > 1:
        raise ValueError(f"{source.path}: {', '.join(names)} differ in dtype")
    return dtypes.pop()


def _first_dtype(source: SafetensorsDir) -> torch.dtype:
    """The dtype of what the directory does not have: its embedding's."""
    return source.dtype("model.embed_tokens.weight")


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def _quietly() -> None:
    """Announces nothing."""
