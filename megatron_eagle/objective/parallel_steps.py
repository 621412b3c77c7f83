"""P-EAGLE's schedule: all K steps of every row in one pass of the draft's layers.

Row p's step t >= 1 reads a mask token's embedding and the learned mask hidden, so it needs no
output of step t - 1, only that step's keys; it attends to what it would attend to in the unroll,
the trunk 0..p and its own row's branch 1..t. All steps become rows of one pass: the projections see
K times as many rows, and every collective of the layers happens once instead of K times.
(P-EAGLE, arXiv 2602.01469.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_eagle.attention.core import AttentionState
from megatron_eagle.draft.model import EagleDraft


class StackedSteps:
    """An attention state for K steps that lie behind one another in one pass: hands them to
    ``state``, one after the other. ``parts`` ranks each bring all K steps of their rows, as
    sequence parallelism gathers them."""

    def __init__(self, state: AttentionState, steps: int, parts: int) -> None:
        self._state, self._steps, self._parts = state, steps, parts

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
        """query [B, n, parts * K * s, d], key and value [B, g, parts * K * s, d]."""
        per_step = zip(*(self._split(x) for x in (query, key, value)), strict=True)
        outputs = [self._state.attend(layer, q, k, v, scale, window, sink) for q, k, v in per_step]
        joined = torch.stack(outputs, dim=2).unflatten(3, (self._parts, -1))
        return joined.transpose(2, 3).flatten(2, 4)

    def _split(self, x: Tensor) -> list[Tensor]:
        """[B, n, parts * K * s, d] -> K times [B, n, parts * s, d]."""
        steps = x.unflatten(2, (self._parts, self._steps, -1)).transpose(2, 3).flatten(3, 4)
        return [step.contiguous() for step in steps.unbind(2)]


def parallel_steps(
    draft: EagleDraft,
    features: Tensor,
    embedding: Tensor,
    mask_embedding: Tensor,
    angles: list[Tensor],
    state: AttentionState,
) -> list[Tensor]:
    """What the head reads of each of K steps, [S', B, H] each.

    features [S', B, A * H]; ``embedding`` [S', B, H] of the tokens that step 0 consumes;
    ``mask_embedding`` [H]; ``angles`` of each step's queries. Collectives: those of one pass of the
    draft's layers, and of fc for the mask hidden.
    """
    steps = len(angles)
    parts = draft.tp_group.size() if draft.config.sequence_parallel else 1
    hidden = draft.start(features)
    masked = draft.masked_start().expand(steps - 1, *hidden.shape).flatten(0, 1)
    tokens = mask_embedding.expand(steps - 1, *hidden.shape).flatten(0, 1)
    stacked = torch.stack(angles).unflatten(1, (parts, -1)).transpose(0, 1).flatten(0, 2)
    output, _ = draft.step(
        torch.cat([embedding, tokens]),
        torch.cat([hidden, masked]),
        stacked,
        StackedSteps(state, steps, parts),
    )
    return list(output.unflatten(0, (steps, -1)).unbind(0))
