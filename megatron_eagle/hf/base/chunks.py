"""The Megatron tensors of a base in blocks, each read from the Hugging Face files when written.

Names and shapes are those of ``GPTModel.sharded_state_dict()`` with Transformer Engine's layers,
which local layers ask for, too: a norm that TE fuses into a linear layer carries that layer's name.
Layers are stacked on a leading axis, except where they differ in kind: then Megatron numbers them.
Experts are stacked on the next axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from megatron_eagle.checkpoint.hybrid_pattern import layer_ends, mixers, pattern_of
from megatron_eagle.checkpoint.writer import Chunk
from megatron_eagle.errors import UserError, literal
from megatron_eagle.hf.base.dense_tables import LAYER_PREFIX
from megatron_eagle.hf.base.families import Family
from megatron_eagle.hf.base.megatron_args import dims_of
from megatron_eagle.hf.base.module_names import DEEPSEEK
from megatron_eagle.hf.base.moe_args import moe_layers
from megatron_eagle.hf.files.safetensors_dir import SafetensorsDir
from megatron_eagle.hf.tables.entries import Dims, Entry, Source

HEAD_NAME, EMBEDDING_NAME = "lm_head.weight", "model.embed_tokens.weight"
CHUNK_BYTES = 64 * 2**20
Progress = Callable[[str], None]
Axes = tuple[tuple[int, int], ...]
"""The leading axes of a stacked tensor, as (index, size)."""


@dataclass(frozen=True)
class BaseTensors:
    """All tensors of one base of ``family``, in both namings; ``facts`` come from ``facts_of``."""

    family: Family
    facts: Mapping[str, Any]

    @cached_property
    def dims(self) -> Dims:
        """Return the sizes of the name tables' symbols."""
        return dims_of(self.facts)

    @cached_property
    def layers(self) -> list[list[Entry]]:
        """Return the name-table entries of every layer."""
        kinds = zip(moe_layers(self.facts), mixers(self.facts), strict=True)
        return [self.family.in_layer(self.facts, moe, mixer) for moe, mixer in kinds]

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Return the Hugging Face names -> shapes that a complete directory holds."""
        dims, facts = self.dims, self.facts
        prefixed = [("", entry) for entry in self.family.outside_layers(facts)]
        for layer, entries in enumerate(self.layers):
            prefixed += [(LAYER_PREFIX.format(layer), entry) for entry in entries]
        return {
            prefix + source.name.format(expert): source.sizes(dims)
            for prefix, entry in prefixed
            for source in entry.read_from(facts)
            for expert in range(dims["E"] if "{}" in source.name else 1)
        }

    def ignored(self, present: Iterable[str]) -> set[str]:
        """Return the names that may be there and are not imported.

        They are the copy of a tied output layer, old rope buffers, and those tensors of ``present``
        that belong to next-token modules.
        """
        names = {
            LAYER_PREFIX.format(layer) + name
            for layer in range(len(self.layers))
            for name in self.family.ignored_in_layer
        }
        modules = self.family.module or DEEPSEEK
        prefixes = modules.prefixes(len(self.layers), self.facts["mtp_layers"])
        names |= {name for name in present if name.startswith(prefixes)}
        absent = self.family.absent(self.facts)
        return names | {source.name for entry in absent for source in entry.sources}

    def check_tied(self, source: SafetensorsDir) -> None:
        """Raise ``UserError`` if ``source`` holds an output layer other than the embedding that
        config.json says is the output layer too."""
        name = HEAD_NAME
        if self.facts["untied"] or name not in source.headers:
            return
        shape = source.headers[EMBEDDING_NAME].shape
        same = source.headers[name].shape == shape
        rows = max(1, CHUNK_BYTES // (4 * math.prod(shape[1:])))
        for start in range(0, shape[0] if same else 0, rows):
            stop = min(start + rows, shape[0])
            head, embedding = (source.tensor(n, start, stop) for n in (name, EMBEDDING_NAME))
            same = same and head.equal(embedding)
        if not same:
            raise UserError(
                f"<hf> {literal(source.headers[name].file)}: {name} is not {EMBEDDING_NAME}, "
                "though config.json says tie_word_embeddings = true; if the files are right, say "
                "false there"
            )

    def chunks(self, source: SafetensorsDir, progress: Progress) -> Iterator[Chunk]:
        """Yield every block in writing order, layers first; ``progress`` is told when one loads."""
        for layer, entries in enumerate(self.layers):
            line = f"layer {layer + 1}/{len(self.layers)}"
            for position, entry in enumerate(entries):
                announce = partial(progress, line) if position == 0 else _announce_nothing
                yield from self._layer_chunks(source, entry, layer, announce)
        for entry in self.family.outside_layers(self.facts):
            yield from self._row_chunks(source, entry, partial(progress, entry.megatron))

    def extra_states(self) -> dict[str, None]:
        """Return the (empty) extra states that Megatron's linear layers want in a strict load."""
        states: dict[str, None] = {}
        if pattern_of(self.facts) is not None:  # a GPTModel leaves its own out
            states["output_layer._extra_state/shard_0_1"] = None
        for layer, entries in enumerate(self.layers):
            for entry in entries:
                if (module := _linear_of(entry.megatron)) is None:
                    continue
                for expert in range(self.dims["E"] if entry.per_expert else 1):
                    prefix, axes = self._place(entry, layer, expert)
                    index, sizes = zip(*(axes or ((0, 1),)), strict=True)
                    shard = f"shard_{_dotted(index)}_{_dotted(sizes)}"
                    states[f"{prefix}{module}._extra_state/{shard}"] = None
        return states

    def _place(self, entry: Entry, layer: int, expert: int) -> tuple[str, Axes]:
        """Return the key's prefix and the leading axes of one layer's (and expert's) part."""
        pattern = pattern_of(self.facts)
        numbered = "moe_layer_freq" in self.facts or pattern is not None
        if pattern is not None:  # a layer is two of Megatron's
            layer = layer_ends(pattern)[layer] - (not _in_mlp(entry))
        prefix = f"decoder.layers.{layer}." if numbered else "decoder.layers."
        axes: Axes = () if numbered else ((layer, len(self.layers)),)
        return prefix, axes + (((expert, self.dims["E"]),) if entry.per_expert else ())

    def _layer_chunks(
        self, source: SafetensorsDir, entry: Entry, layer: int, announce: Callable[[], None]
    ) -> Iterator[Chunk]:
        """Yield one layer's tensor as one block, or as one block for each expert."""
        dims, shape = self.dims, entry.sizes(self.dims)
        for expert in range(dims["E"] if entry.per_expert else 1):
            prefix, axes = self._place(entry, layer, expert)
            parts = [
                (part, LAYER_PREFIX.format(layer) + part.name.format(expert))
                for part in entry.read_from(self.facts)
            ]
            dtype = _common_dtype(source, [name for _, name in parts])
            ones = (1,) * len(axes)

            def load(
                parts: Sequence[tuple[Source, str]] = parts,
                expert: int = expert,
                dtype: torch.dtype = dtype,
                block: tuple[int, ...] = ones + shape,
            ) -> torch.Tensor:
                if expert == 0:
                    announce()
                if not parts:
                    return torch.zeros(block, dtype=dtype)
                tensors = [
                    _read(source, part, name, expert if entry.per_expert else None)
                    for part, name in parts
                ]
                return entry.join(tensors, dims).reshape(block)

            yield Chunk(
                prefix + entry.megatron,
                tuple(size for _, size in axes) + shape,
                tuple(index for index, _ in axes) + (0,) * len(shape),
                ones + shape,
                dtype,
                load,
            )

    def _row_chunks(
        self, source: SafetensorsDir, entry: Entry, announce: Callable[[], None]
    ) -> Iterator[Chunk]:
        """Yield one tensor in blocks of rows: a tensor-parallel rank reads only those it needs."""
        (part,) = entry.sources
        shape = entry.sizes(self.dims)
        dtype = source.dtype(part.name)
        rows = max(1, CHUNK_BYTES // (dtype.itemsize * math.prod(shape[1:])))
        for start in range(0, shape[0], rows):
            stop = min(start + rows, shape[0])

            def load(start: int = start, stop: int = stop) -> torch.Tensor:
                if start == 0:
                    announce()
                return _finite(source, part.name, source.tensor(part.name, start, stop))

            offset = (start,) + (0,) * (len(shape) - 1)
            yield Chunk(entry.megatron, shape, offset, (stop - start, *shape[1:]), dtype, load)


def _in_mlp(entry: Entry) -> bool:
    """Return whether the tensor belongs to a layer's MLP, not to what mixes positions."""
    return entry.megatron.startswith(("mlp.", "pre_mlp_layernorm."))


def _linear_of(name: str) -> str | None:
    """Return the linear layer that the tensor ``name`` is the weight (or its first part) of."""
    module, _, parameter = name.removesuffix(".query").rpartition(".")
    own = module.rpartition(".")[2]
    linear = own.startswith("linear_") or own in ("in_proj", "out_proj")
    return module if linear and parameter == "weight" else None


def _read(source: SafetensorsDir, part: Source, name: str, expert: int | None) -> torch.Tensor:
    if expert is not None and part.stacked:
        return _finite(source, name, source.tensor(name, expert, expert + 1)[0])
    return _finite(source, name, source.tensor(name))


def _finite(source: SafetensorsDir, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor``; raise ``UserError`` naming it if it holds NaN or infinite values."""
    if not tensor.isfinite().all():
        file = source.headers[name].file
        raise UserError(f"<hf> {literal(file)}: {name} holds NaN or infinite values")
    return tensor


def _common_dtype(source: SafetensorsDir, names: list[str]) -> torch.dtype:
    """Return the dtype of the tensors ``names``; that of the embedding where there are none."""
    dtypes = {source.dtype(name) for name in names or [EMBEDDING_NAME]}
    if len(dtypes) > 1:
        raise UserError(f"{source.path}: {', '.join(names)} differ in dtype")
    return dtypes.pop()


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def _announce_nothing() -> None:
    """Do nothing."""
