"""Let the draft's last layer go on with the live rows after its keys and values are made.

Its attention answers the queries of live rows alone (``TrunkBranchState``) and, if it can, makes no
others (``live_queries``). What the output of attention is added to, the residual stream, has to be
cut down to the same rows. Megatron's layer takes the residual from its ``input_layernorm`` if that
returns a pair, so a forward hook there is enough; parameters and checkpoint names stay.

Shape letters: S' this rank's tokens, B micro-batch, H hidden, N live rows, Q queries of the last
layer, T tensor-parallel ranks under sequence parallelism (otherwise 1), d RoPE channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.attention.live_rows import LiveRows
from megatron_eagle.compat import gather_from_sequence_parallel_region
from megatron_eagle.draft.live_queries import LiveQueryAttention


class Narrowing:
    """Narrow the queries of ``layer``, and its residual by a hook on its ``input_layernorm``,
    inside :meth:`to`.

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
        self._attention: LiveQueryAttention | None = None
        if isinstance(attention, LiveQueryAttention) and attention.splits_products:
            self._attention = attention
        layer.input_layernorm.register_forward_hook(self._narrow)

    @contextmanager
    def to(self, live: LiveRows | None, query_rows: Tensor | None = None) -> Iterator[None]:
        """Narrow the layer to ``live``, or do nothing for None, inside the context. ``query_rows``
        [Q]: the rows of the pass that have queries, if they are not those of ``live``."""
        self._live = live
        if self._attention is not None and live is not None:
            self._attention.query_rows = live.index if query_rows is None else query_rows
        try:
            yield
        finally:
            self._live = None
            if self._attention is not None:
                self._attention.query_rows = None

    def angles(self, every: Tensor | None, batch: int) -> Any:
        """Return the RoPE angles of the layer's (queries [Q, 1, 1, d], keys), or ``every``
        [S, 1 or B, 1, d] of both where none is left out; ``batch`` is B."""
        attention = self._attention
        if attention is None or attention.query_rows is None:
            return every
        assert every is not None
        rows = every.expand(-1, batch, -1, -1).flatten(0, 1)
        return rows[attention.query_rows].unsqueeze(1), every

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
        return whole.flatten(0, 1).index_select(0, mine).unsqueeze(1)

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
