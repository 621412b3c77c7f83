"""P-EAGLE's schedule: all K steps of every row in one pass of the draft's layers.

Row p's step t >= 1 reads a mask token's embedding and the learned mask hidden, so it needs no
output of step t - 1, only that step's keys; it attends to what it would attend to in the unroll,
the trunk 0..p and its own row's branch 1..t. All steps become rows of one pass: the projections see
K times as many rows, and every collective of the layers happens once instead of K times.
(P-EAGLE, arXiv 2602.01469.)

S' this rank's tokens, B micro-batch, H hidden, K TTT steps, n query heads, g key/value heads, d
head size, s tokens of a step that one sequence-parallel rank brings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_eagle.attention.core import AttentionState
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.objective.draft_inputs import DraftInputs


class StackedSteps:
    """Attention state of K steps that lie behind one another in one pass.

    Passes them to ``state`` one after the other. ``parts`` ranks each bring all K steps of their
    rows, as sequence parallelism gathers them.
    """

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
        """Attend with query [B, n, parts * K * s, d], key and value [B, g, parts * K * s, d]."""
        per_step = zip(*(self._split(x) for x in (query, key, value)), strict=True)
        outputs = [self._state.attend(layer, q, k, v, scale, window, sink) for q, k, v in per_step]
        joined = torch.stack(outputs, dim=2).unflatten(3, (self._parts, -1))
        return joined.transpose(2, 3).flatten(2, 4)

    def _split(self, x: Tensor) -> list[Tensor]:
        """Split [B, n, parts * K * s, d] into K times [B, n, parts * s, d]."""
        steps = x.unflatten(2, (self._parts, self._steps, -1)).transpose(2, 3).flatten(3, 4)
        return [step.contiguous() for step in steps.unbind(2)]


def parallel_steps(draft: EagleDraft, inputs: DraftInputs, state: AttentionState) -> list[Tensor]:
    """Run all K steps in one pass; return the head's inputs of each, [S', B, H].

    Collectives: those of one pass of the draft's layers, and of fc for the mask hidden state.
    """
    assert inputs.mask_embedding is not None
    steps = len(inputs.angles)
    parts = draft.tp_group.size() if draft.config.sequence_parallel else 1
    hidden = draft.start(inputs.features)
    masked = draft.masked_start().expand(steps - 1, *hidden.shape).flatten(0, 1)
    tokens = inputs.mask_embedding.expand(steps - 1, *hidden.shape).flatten(0, 1)
    angles = torch.stack(list(inputs.angles)).unflatten(1, (parts, -1)).transpose(0, 1)
    output, _ = draft.step(
        torch.cat([inputs.embedding(0), tokens]),
        torch.cat([hidden, masked]),
        angles.flatten(0, 2),
        StackedSteps(state, steps, parts),
    )
    return list(output.unflatten(0, (steps, -1)).unbind(0))
