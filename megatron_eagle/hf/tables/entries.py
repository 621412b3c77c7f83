"""One row of a name table: a Megatron tensor, and the Hugging Face tensors it is made of.

Shapes are written with symbols, which `megatron_eagle.hf.base.megatron_args.dims_of` turns into
numbers:
V vocab_size, H hidden, Q heads x head_dim, KV groups x head_dim, D head_dim, F ffn hidden,
N heads, E experts, M an expert's ffn hidden, G 2 M, S the shared experts' ffn hidden. Of
multi-latent attention: QR and KR the ranks of queries and of keys and values, P the rotary
channels, LQ, LKV and LV all heads' queries, keys with values, and values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Dims = dict[str, int]
Join = Callable[[Sequence[torch.Tensor], Dims], torch.Tensor]
EXPERTS = "mlp.experts.experts."
"""Megatron tensors below this name have an expert axis in front."""


@dataclass(frozen=True)
class Source:
    """One Hugging Face tensor: its name (inside its layer, or whole) and its symbolic shape.

    `{}` in the name stands for an expert's number; a shape that begins with E is of a tensor that
    holds all experts, of which an entry of experts takes its own.
    """

    name: str
    shape: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        """Whether it holds all experts."""
        return self.shape[0] == "E" and "{}" not in self.name

    def sizes(self, dims: Dims) -> tuple[int, ...]:
        """The shape in numbers."""
        return tuple(_in_numbers(size, dims) for size in self.shape)


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor of shape `shape`, made from `sources` by `join`.

    It exists when the fact named `when` is true (always, without one). Where the fact named
    `given` is false, the model has no such tensor, though Megatron's has: it is zeros.
    """

    megatron: str
    shape: tuple[str, ...]
    sources: tuple[Source, ...]
    join: Join
    when: str | None = None
    given: str | None = None

    @property
    def per_expert(self) -> bool:
        """Whether every expert has one."""
        return self.megatron.startswith(EXPERTS)

    def exists(self, facts: Mapping[str, Any]) -> bool:
        """Whether Megatron's model of these facts has the tensor."""
        if self.when is None:
            return True
        wanted = not self.when.startswith("no ")
        return bool(facts.get(self.when.removeprefix("no "))) == wanted

    def read_from(self, facts: Mapping[str, Any]) -> tuple[Source, ...]:
        """The tensors to read: none where it is zeros."""
        return self.sources if self.given is None or facts[self.given] else ()

    def sizes(self, dims: Dims) -> tuple[int, ...]:
        """Shape of the Megatron tensor (of one expert's, for an entry of experts)."""
        return tuple(_in_numbers(size, dims) for size in self.shape)


def _in_numbers(size: str, dims: Dims) -> int:
    return sum(dims[part] for part in size.split("+"))


def join_rows(parts: Sequence[torch.Tensor], dims: Dims) -> torch.Tensor:
    """The parts below one another: one tensor as it is, or [gate ; up] (its TP split is by halves,
    which Megatron's sharded state dict describes)."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def join_query_groups(parts: Sequence[torch.Tensor], dims: Dims) -> torch.Tensor:
    """q [Q, ...], k [KV, ...], v [KV, ...] -> rows per query group [q_1 .. q_r, k, v]."""
    grouped = [part.reshape(dims["groups"], -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def join_transposed(parts: Sequence[torch.Tensor], dims: Dims) -> torch.Tensor:
    """One matrix stored as [in, out]."""
    return parts[0].t()


def join_interleaved(parts: Sequence[torch.Tensor], dims: Dims) -> torch.Tensor:
    """gate_1, up_1, gate_2 .. as [gate ; up]: the columns of a matrix [in, out], or a bias."""
    rows = parts[0].t()
    return torch.cat([rows[0::2], rows[1::2]])


def one(megatron: str, name: str, *shape: str, when: str | None = None) -> Entry:
    """A tensor taken as it is."""
    return Entry(megatron, shape, (Source(name, shape),), join_rows, when)


def rows(megatron: str, sources: Sequence[tuple[str, str]], *trailing: str, **rest: Any) -> Entry:
    """Tensors (name, rows) below one another, all of the same trailing shape."""
    parts = tuple(Source(name, (size, *trailing)) for name, size in sources)
    shape = "+".join(size for _, size in sources)
    return Entry(megatron, (shape, *trailing), parts, join_rows, **rest)


def qkv(suffix: str, *trailing: str, **rest: Any) -> Entry:
    """linear_qkv's weight or bias from the separate q, k and v."""
    sizes = {"q_proj": "Q", "k_proj": "KV", "v_proj": "KV"}
    sources = tuple(
        Source(f"self_attn.{name}.{suffix}", (size, *trailing)) for name, size in sizes.items()
    )
    megatron = f"self_attention.linear_qkv.{suffix}"
    return Entry(megatron, ("Q+KV+KV", *trailing), sources, join_query_groups, **rest)
