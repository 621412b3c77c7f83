"""Let the draft's last layer go on with the live rows after its keys and values are made.

Its attention answers the queries of live rows alone (``TrunkBranchState``), and what the output of
attention is added to, the residual stream, has to be cut down to the same rows. Megatron's layer
takes the residual from its ``input_layernorm`` if that returns a pair, so a forward hook there is
enough; parameters and checkpoint names stay.

Shape letters: S' this rank's tokens, B micro-batch, H hidden, N live rows, T tensor-parallel ranks
under sequence parallelism (otherwise 1).
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


class Narrowing:
    """A hook on the ``input_layernorm`` of ``layer`` that narrows the residual inside :meth:`to`.

    Args:
        layer: a Megatron TransformerLayer.
        group: its tensor-parallel group.
        sequence_parallel: rows are cut over ``group``.
    """

    def __init__(self, layer: Any, group: ProcessGroup, sequence_parallel: bool) -> None:
        self._group = group
        self._gathers = sequence_parallel and group.size() > 1
        self._live: LiveRows | None = None
        layer.input_layernorm.register_forward_hook(self._narrow)

    @contextmanager
    def to(self, live: LiveRows | None) -> Iterator[None]:
        """Narrow the layer's residual to ``live``, or do nothing for None, inside the context."""
        self._live = live
        try:
            yield
        finally:
            self._live = None

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
