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
    every later step.
    """

    def __init__(self, state: AttentionState, live: LiveRows, steps: int, batch: int) -> None:
        self._state, self._steps, self._parts = state, steps, live.parts
        self._batch, self._first = batch, live.total // live.parts
        self._later = live.index.numel() // live.parts

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
        per_step = zip(*(self._split(x) for x in (query, key, value)), strict=True)
        outputs = [self._state.attend(layer, q, k, v, scale, window, sink) for q, k, v in per_step]
        outputs[0] = outputs[0].permute(1, 2, 0, 3).flatten(1, 2).unsqueeze(0)
        return interleave(outputs, self._parts, dim=2)

    def _split(self, x: Tensor) -> list[Tensor]:
        """Split [1, n, rows, d] into step 0's [B, n, S / CP, d] and the others' [1, n, N, d]."""
        sizes = [self._first, *[self._later] * (self._steps - 1)]
        pieces = x.split(sizes * self._parts, dim=2)
        steps = [torch.cat(pieces[step :: self._steps], dim=2) for step in range(self._steps)]
        steps[0] = steps[0][0].unflatten(1, (-1, self._batch)).permute(2, 0, 1, 3)
        return steps


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

    def behind(first: Tensor, masked: Tensor) -> Tensor:
        return torch.cat([first.flatten(0, 1).unsqueeze(1), masked.expand(later, 1, -1)])

    first_angles = inputs.angles[0].expand(-1, batch, -1, -1).flatten(0, 1).unsqueeze(1)
    output, _ = draft.step(
        behind(inputs.embedding(0), inputs.mask_embedding),
        behind(hidden, draft.masked_start()),
        interleave([first_angles, *inputs.angles[1:]], live.parts),
        StackedSteps(state, live, steps, batch),
        live,
    )
    return list(output.unflatten(0, (steps, -1)).unbind(0))
