"""Name tables: which Hugging Face tensors make up which Megatron tensor.

A table maps Megatron names to rows. A row is a tuple ``(Hugging Face name, *shape)`` where the
tensor is copied as it is. ``one``, ``rows`` and ``qkv`` make the other rows (each an ``Entry`` that
lacks only its Megatron name): several tensors joined, or a tensor that not every model has.

Shapes are written with symbols, "A+B" for a sum. ``megatron_eagle.hf.base.megatron_args.dims_of``
turns them into numbers:

    V  vocab_size                          N   attention heads
    H  hidden_size                         HD  head_dim (kv_channels)
    F  ffn_hidden_size                     Q   N x HD, all query heads
    E  experts                             KV  query groups x HD, all keys (or all values)
    M  ffn_hidden_size of an expert        S   ffn_hidden_size of the shared experts
    G  2 M, an expert's gate and up

and for multi-latent attention:

    QR  q_lora_rank                        LQ   N x (qk_head_dim + P), all queries
    KR  kv_lora_rank                       LKV  N x (qk_head_dim + v_head_dim), all keys and values
    P   qk_pos_emb_head_dim                LV   N x v_head_dim, all values

and for gated delta nets:

    NV  value heads                        DK   key heads x linear_key_head_dim, all keys
    VD  linear_value_head_dim              DV   NV x VD, all values
    C   linear_conv_kernel_dim

``megatron_eagle.hf.draft.names`` adds a draft's symbols; none has two meanings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Dims = dict[str, int]
Join = Callable[[Sequence[torch.Tensor], Dims], torch.Tensor]
EXPERTS = "mlp.experts.experts."
"""Megatron tensors below this name have an expert axis in front."""


@dataclass(frozen=True)
class Source:
    """One Hugging Face tensor: its name (inside its layer, or whole) and its symbolic shape.

    ``{}`` in the name stands for an expert's number. Without it, a shape that begins with E is that
    of one tensor for all experts, from which an entry of experts takes one slice each.
    """

    name: str
    shape: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        """Whether one tensor holds all experts."""
        return self.shape[0] == "E" and "{}" not in self.name

    def sizes(self, dims: Dims) -> tuple[int, ...]:
        """Return the shape in numbers."""
        return _in_numbers(self.shape, dims)


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor of symbolic shape ``shape``, made from ``sources`` by ``join``.

    ``when`` and ``unless`` name a fact: the tensor exists if it is true (``when``) or false
    (``unless``), and always without either. ``zeros_unless`` names a fact, too: if it is false,
    Hugging Face's model has no such tensor and Megatron's is filled with zeros.
    """

    megatron: str
    shape: tuple[str, ...]
    sources: tuple[Source, ...]
    join: Join
    when: str | None = None
    unless: str | None = None
    zeros_unless: str | None = None

    @property
    def per_expert(self) -> bool:
        """Whether there is one such tensor for each expert."""
        return self.megatron.startswith(EXPERTS)

    def exists(self, facts: Mapping[str, Any]) -> bool:
        """Return whether Megatron's model of these facts has the tensor."""
        if self.when is not None and not facts.get(self.when):
            return False
        return self.unless is None or not facts.get(self.unless)

    def read_from(self, facts: Mapping[str, Any]) -> tuple[Source, ...]:
        """Return the tensors to read; none where Megatron's is filled with zeros."""
        return self.sources if self.zeros_unless is None or facts[self.zeros_unless] else ()

    def sizes(self, dims: Dims) -> tuple[int, ...]:
        """Return the shape of the Megatron tensor (for experts, of a single one's)."""
        return _in_numbers(self.shape, dims)


Row = tuple[str, ...] | partial[Entry]
Table = Mapping[str, Row]


def entries_of(table: Table) -> tuple[Entry, ...]:
    """Return the entries of a name table, in its order."""
    return tuple(
        (one(*row) if isinstance(row, tuple) else row)(megatron) for megatron, row in table.items()
    )


def with_symbols(dims: Dims, more: Dims) -> Dims:
    """Return ``dims`` and ``more`` together; raises where a symbol would have two meanings."""
    if twice := sorted(dims.keys() & more.keys()):
        raise AssertionError(f"shape symbols with two meanings: {', '.join(twice)}")
    return {**dims, **more}


def one(name: str, *shape: str, **conditions: str) -> partial[Entry]:
    """Return the row of a tensor that is copied as it is; ``conditions`` are fields of Entry."""
    return partial(Entry, shape=shape, sources=(Source(name, shape),), join=join_rows, **conditions)


def rows(sources: Mapping[str, str], *trailing: str, **conditions: str) -> partial[Entry]:
    """Return the row of tensors (name -> number of rows) below one another.

    All have the same ``trailing`` shape. ``conditions`` are fields of Entry.
    """
    parts = tuple(Source(name, (size, *trailing)) for name, size in sources.items())
    shape = ("+".join(sources.values()), *trailing)
    return partial(Entry, shape=shape, sources=parts, join=join_rows, **conditions)


def qkv(suffix: str, *trailing: str, **conditions: str) -> partial[Entry]:
    """Return the row of Megatron's linear_qkv, made from separate queries, keys and values.

    ``suffix`` is "weight" or "bias". ``conditions`` are fields of Entry.
    """
    sizes = {"q_proj": "Q", "k_proj": "KV", "v_proj": "KV"}
    parts = tuple(
        Source(f"self_attn.{name}.{suffix}", (size, *trailing)) for name, size in sizes.items()
    )
    shape = ("Q+KV+KV", *trailing)
    return partial(Entry, shape=shape, sources=parts, join=join_query_groups, **conditions)


def join_rows(parts: Sequence[torch.Tensor], dims: Dims) -> torch.Tensor:
    """Return the parts below one another.

    That is one tensor as it is, or [gate ; up], of which Megatron's sharded state dict says that
    tensor parallelism cuts each half by itself.
    """
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def join_query_groups(parts: Sequence[torch.Tensor], dims: Dims) -> torch.Tensor:
    """Return q [Q, ...], k [KV, ...], v [KV, ...] as rows per query group [q_1 .. q_r, k, v]."""
    grouped = [part.reshape(dims["groups"], -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def join_transposed(parts: Sequence[torch.Tensor], dims: Dims) -> torch.Tensor:
    """Return [out, in] of one matrix stored as [in, out]."""
    return parts[0].t()


def join_interleaved(parts: Sequence[torch.Tensor], dims: Dims) -> torch.Tensor:
    """Return [gate ; up] of a matrix [in, out], or a bias, whose columns are gate_1, up_1, .."""
    columns = parts[0].t()
    return torch.cat([columns[0::2], columns[1::2]])


def _in_numbers(shape: tuple[str, ...], dims: Dims) -> tuple[int, ...]:
    return tuple(sum(dims[symbol] for symbol in size.split("+")) for size in shape)
