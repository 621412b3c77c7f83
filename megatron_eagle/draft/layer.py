"""Draft layer specs: any self-attention TransformerLayer spec, its first layer widened to 2H.

EAGLE-3's first layer reads [embedding ; hidden]. Two facts make Megatron's own TransformerLayer do
it, without a layer class of this package: an ``input_layernorm`` may return (output, residual), and
a linear's builder decides its input width. EAGLE-1 joins both by fc instead; its first layer has no
``input_layernorm``.

The last layer can go on with the live rows once its keys and values are made (:class:`Narrowing`).

Shape letters: S sequence, S' this rank's tokens, B micro-batch, H hidden, N live rows, Q queries of
the last layer, T tensor-parallel ranks under sequence parallelism (otherwise 1), d RoPE channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.attention.live_rows import LiveRows, take_rows
from megatron_eagle.compat import (
    IdentityOp,
    SelfAttention,
    gather_from_sequence_parallel_region,
)
from megatron_eagle.config import DraftSpec
from megatron_eagle.draft.live_mla import LiveQueryMLA
from megatron_eagle.draft.live_queries import LiveQueryAttention, with_live_queries
from megatron_eagle.draft.mla import DraftMLASelfAttention, use_mla
from megatron_eagle.draft.moe import keep_balance_losses
from megatron_eagle.layers.backend import LayerBackend


class EmbeddingHiddenNorm(torch.nn.Module):
    """Two RMSNorms side by side: one of the embedding, one of the hidden state.

    [S, B, 2H] holding [embedding ; hidden] -> (normed [S, B, 2H], residual [S, B, H]); the residual
    is the un-normed hidden state, or the normed one with ``normed_residual``. Under sequence
    parallelism S is this rank's part, and the weights are marked so that their gradients are summed
    over TP.
    """

    def __init__(
        self,
        norm: Callable[..., torch.nn.Module],
        normed_residual: bool,
        config: Any,
        hidden_size: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.normed_residual = normed_residual
        self.embedding_norm = norm(config=config, hidden_size=hidden_size, eps=eps)
        self.hidden_norm = norm(config=config, hidden_size=hidden_size, eps=eps)

    def forward(self, embedding_and_hidden: Tensor) -> tuple[Tensor, Tensor]:
        embedding, hidden = embedding_and_hidden.chunk(2, dim=-1)
        normed_hidden = self.hidden_norm(hidden)
        normed = torch.cat([self.embedding_norm(embedding), normed_hidden], dim=-1)
        return normed, normed_hidden if self.normed_residual else hidden


def draft_layer_specs(backend: LayerBackend, config: Any, spec: DraftSpec) -> list[Any]:
    """Return TransformerLayer specs of the draft's ``config.num_layers`` layers.

    All attend through ``attention.core.EagleCoreAttention``. The first takes [S, B, 2H], or for an
    algorithm that joins both halves by ``fc`` [S, B, H] without a norm. The last one can make
    queries of some rows only.
    """
    layers = [backend.layer_spec(config) for _ in range(config.num_layers)]
    joined, linear = spec.method.joins_by_fc, backend.column_linear
    for number, layer in enumerate(layers):
        if config.num_moe_experts is not None:
            keep_balance_losses(layer)
        if config.multi_latent_attention:
            widening = 1 if joined or number else 2
            use_mla(layer, widening * config.hidden_size, backend.norm)
    _replace_linear(layers[0], linear)
    let_queries_be_fewer(layers[-1], linear)
    if joined:
        layers[0].submodules.input_layernorm = IdentityOp
    else:
        norm = partial(EmbeddingHiddenNorm, backend.norm, spec.norm_before_residual)
        layers[0].submodules.input_layernorm = norm
        _double_input(layers[0])
    return layers


def let_queries_be_fewer(layer_spec: Any, linear: Callable[..., Any]) -> None:
    """Let the layer answer the queries of some rows only, and make no others if it has MLA or its
    ``linear_qkv`` is a ``linear`` without a norm fused into it."""
    attention = layer_spec.submodules.self_attention
    if attention.module is DraftMLASelfAttention:
        attention.module = LiveQueryMLA
    elif attention.module is SelfAttention:
        attention.module = LiveQueryAttention
        if attention.submodules.linear_qkv is linear:
            attention.submodules.linear_qkv = with_live_queries(linear)


def _replace_linear(layer_spec: Any, linear: Callable[..., Any]) -> None:
    """Make ``linear_qkv`` of a ``linear`` without a norm; that of the layer, if it has one, has a
    checkpoint name of its own."""
    submodules = layer_spec.submodules
    if hasattr(submodules.self_attention.submodules, "linear_qkv"):
        submodules.self_attention.submodules.linear_qkv = linear
    submodules.sharded_state_dict_keys_map = {
        key: value
        for key, value in submodules.sharded_state_dict_keys_map.items()
        if not key.startswith("input_layernorm")
    }


def _double_input(layer_spec: Any) -> None:
    """Let ``linear_qkv`` read twice as many channels."""
    submodules = layer_spec.submodules.self_attention.submodules
    linear = getattr(submodules, "linear_qkv", None)
    if linear is None:
        return

    def build(input_size: int, output_size: int, **kwargs: Any) -> torch.nn.Module:
        module: torch.nn.Module = linear(2 * input_size, output_size, **kwargs)
        return module

    submodules.linear_qkv = build


class Narrowing:
    """Let ``layer`` go on with the live rows alone after its keys and values, inside :meth:`to`.

    Its attention answers the queries of live rows alone (``TrunkBranchState``) and, if it can,
    makes no others (``live_queries``, ``live_mla``). What the output of attention is added to, the
    residual stream, has to be cut down to the same rows. Megatron's layer takes the residual from
    its ``input_layernorm`` if that returns a pair, so a forward hook there is enough; parameters
    and checkpoint names stay.

    Args:
        layer: a Megatron TransformerLayer.
        group: its tensor-parallel group.
        sequence_parallel: rows are cut over ``group``.
    """

    def __init__(self, layer: Any, group: ProcessGroup, sequence_parallel: bool) -> None:
        self._group = group
        self._gathers = sequence_parallel and group.size() > 1
        self._live: LiveRows | None = None
        self._layer, attention = layer, layer.self_attention
        self._attention: LiveQueryAttention | LiveQueryMLA | None = None
        makes_fewer = isinstance(attention, LiveQueryAttention | LiveQueryMLA)
        self._answering: LiveQueryAttention | None = None
        if makes_fewer and attention.splits_products:
            self._attention = attention
        elif isinstance(attention, LiveQueryAttention):
            self._answering = attention
        layer.input_layernorm.register_forward_hook(self._narrow)

    @contextmanager
    def to(self, live: LiveRows | None, query_rows: Tensor | None = None) -> Iterator[None]:
        """Narrow the layer to ``live``, or do nothing for None, inside the context. ``query_rows``
        [Q]: the rows of the pass that have queries, if they are not those of ``live``."""
        self._live = live
        rows = live.index if live is not None and query_rows is None else query_rows
        self._set_rows(None if live is None else rows)
        try:
            yield
        finally:
            self._live = None
            self._set_rows(None)

    def _set_rows(self, rows: Tensor | None) -> None:
        if self._attention is not None:
            self._attention.query_rows = rows
        if self._answering is not None:
            self._answering.answered_rows = rows

    def angles(self, every: Tensor | None, batch: int) -> Any:
        """Return the RoPE angles of the layer's (queries [Q, 1, 1, d], keys), or ``every``
        [S, 1 or B, 1, d] of both where none is left out (None for MLA, which asks for its own);
        ``batch`` is B."""
        attention = self._attention
        if every is None or attention is None or attention.query_rows is None:
            return every
        return take_rows(every.expand(-1, batch, -1, -1), attention.query_rows), every

    def trunk_weights(self) -> int:
        """Count the elements of the layer's matrices on this rank that all rows meet, live or not:
        those that make keys and values."""
        if self._attention is not None:
            return self._attention.key_value_weights
        return sum(  # they come with the queries
            parameter.numel()
            for name, parameter in self._layer.self_attention.named_parameters()
            if parameter.dim() > 1 and not name.startswith("linear_proj.")
        )

    def take(self, rows: Tensor) -> Tensor:
        """Cut this rank's rows [S', B, H] down to its live ones, [N / T, 1, H]; differentiable.

        Under sequence parallelism the live rows are shared out anew: one all-gather over TP
        (backward: one reduce-scatter), otherwise no collective.
        """
        assert self._live is not None
        if not self._gathers:
            return self._live.take(rows)
        whole = gather_from_sequence_parallel_region(
            rows, tensor_parallel_output_grad=True, group=self._group
        )
        mine = self._live.part(self._group.rank())
        return take_rows(whole, mine)

    def _narrow(self, module: torch.nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        """Replace the norm's ``output`` by (normed, narrowed residual)."""
        if self._live is None:
            return None
        normed, residual = output if isinstance(output, tuple) else (output, args[0])
        size = self._live.total // self._live.parts
        rows = residual.flatten(0, 1)
        narrowed = self.take(rows[:size].unsqueeze(1))
        if rows.shape[0] > size:  # later steps in the same pass: live rows already
            narrowed = torch.cat([narrowed, rows[size:].unsqueeze(1)])
        return normed, narrowed
