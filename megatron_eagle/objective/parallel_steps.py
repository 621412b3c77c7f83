"""All TTT steps in one pass of the draft's layers, for an algorithm that feeds nothing back.

Later steps read a learned mask hidden state and the mask token's embedding, so their live rows can
stand behind the rows of step 0. Under sequence parallelism every rank's part holds its rows of all
steps.

Shape letters: S' this rank's tokens, B micro-batch, H hidden, K TTT steps, N live rows, n and g
query and key heads, T tensor-parallel ranks under sequence parallelism (otherwise 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_eagle.attention.core import AttentionState
from megatron_eagle.attention.live_rows import LiveRows
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.objective.inputs import DraftInputs


class StackedSteps:
    """Attention state for one pass over K steps: splits it and hands each step to ``state``.

    A pass has T parts, each with its share of the S / CP * B rows of step 0, then of the N rows of
    every later step. The queries of a layer may be those of the live rows alone, step after step.
    """

    def __init__(self, state: AttentionState, live: LiveRows, steps: int, batch: int) -> None:
        self._state, self._live, self._steps, self._batch = state, live, steps, batch
        first, later = live.total // live.parts, live.index.numel() // live.parts
        self._sizes = [first, *[later] * (steps - 1)] * live.parts

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Attend with query [1, n, rows, d], key and value [1, g, rows, d] of the pass's rows."""
        narrow = query.shape[2] < key.shape[2]
        queries = list(query.chunk(self._steps, dim=2)) if narrow else self._in_place(query)
        per_step = zip(queries, self._in_place(key), self._in_place(value), strict=True)
        outputs = [self._state.attend(layer, q, k, v, scale, window, sink) for q, k, v in per_step]
        rows = [out.permute(1, 2, 0, 3).flatten(1, 2).unsqueeze(0) for out in outputs]
        return interleave(rows, self._live.parts, dim=2)

    def query_rows(self) -> Tensor:
        """Return which rows of the pass are live, step after step: [K * N] int64."""
        index = self._live.index
        rows = torch.arange(sum(self._sizes), device=index.device)
        first, *later = self._split(rows, dim=0)
        return torch.cat([first[index], *later])

    def _in_place(self, x: Tensor) -> list[Tensor]:
        """Split [1, n, rows, d] into step 0's [B, n, S / CP, d] and the others' [1, n, N, d], or
        all of them as step 0's where all rows are live."""
        steps = self._split(x, dim=2)
        for step in range(self._steps if self._live.whole else 1):
            steps[step] = steps[step][0].unflatten(1, (-1, self._batch)).permute(2, 0, 1, 3)
        return steps

    def _split(self, x: Tensor, dim: int) -> list[Tensor]:
        """Split the rows of a pass into those of each step."""
        pieces = x.split(self._sizes, dim)
        return [torch.cat(pieces[step :: self._steps], dim) for step in range(self._steps)]


def interleave(steps: Sequence[Tensor], parts: int, dim: int = 0) -> Tensor:
    """Cut each step's rows into equal parts, and put part after part, each with all steps."""
    by_part = zip(*(step.chunk(parts, dim) for step in steps), strict=True)
    return torch.cat([piece for part in by_part for piece in part], dim)


def parallel_steps(draft: EagleDraft, inputs: DraftInputs, state: AttentionState) -> list[Tensor]:
    """Run all K steps in one pass; return the head's inputs of each, [N / T, 1, H].

    Collectives: those of one pass of the draft's layers, and of fc for the mask hidden state.
    """
    assert inputs.mask_embedding is not None
    live, steps = inputs.live, len(inputs.angles)
    hidden = draft.start(inputs.features)
    batch, later = hidden.shape[1], (steps - 1) * live.index.numel() // live.parts
    stacked = StackedSteps(state, live, steps, batch)

    def behind(first: Tensor, masked: Tensor) -> Tensor:
        return torch.cat([first.flatten(0, 1).unsqueeze(1), masked.expand(later, 1, -1)])

    def of_rows(angles: Tensor, step: int) -> Tensor:
        in_place = step == 0 or live.whole
        return angles.expand(-1, batch, -1, -1).flatten(0, 1).unsqueeze(1) if in_place else angles

    angles = [of_rows(step_angles, step) for step, step_angles in enumerate(inputs.angles)]
    output, _ = draft.step(
        behind(inputs.embedding(0), inputs.mask_embedding),
        behind(hidden, draft.masked_start()),
        interleave(angles, live.parts),
        stacked,
        None if live.whole else live,
        None if live.whole else stacked.query_rows(),
    )
    return list(output.unflatten(0, (steps, -1)).unbind(0))
