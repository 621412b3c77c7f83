"""The K-step unroll of test-time training (TTT).

Every position keeps its row: row p of step t belongs to position p. Step t feeds row p its own
output of step t - 1 and the embedding of the true token x_{p+1+t}, at RoPE position p + t, and
attends to the step-0 keys 0..p and to its own row's keys of steps 1..t. Hidden states are never
shifted, so a sequence- or context-parallel shard needs no exchange between steps; gradients flow
through all K steps, through hidden states and keys.

S sequence, S' this rank's tokens (S cut over CP, and over TP under sequence parallelism), B
micro-batch, H hidden, K TTT steps, M supervised target positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.algorithms import Schedule
from megatron_eagle.attention.core import AttentionState, TrunkBranchState
from megatron_eagle.attention.packing import Packing
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.parallel.context import ContextShard
from megatron_eagle.platform.profiling import nvtx_range
from megatron_eagle.teacher.embedding import step_embeddings


class EmbeddingOfBase(Protocol):
    """The part of the frozen base that the draft's inputs come from."""

    embedding_weight: Tensor
    vocab_size: int
    tp_group: ProcessGroup
    cp_group: ProcessGroup


@dataclass(frozen=True)
class DraftInputs:
    """Everything the K steps read of one micro-batch.

    features [S', B, A * H] (EAGLE-1: [S', B, H], the base's final hidden state). embeddings
    [R, S' / R + K - 1, B, H]: of the tokens after each run of positions. angles: per step the RoPE
    angles of every query, [S / CP, 1 or B, 1, d]. packing: the documents of packed sequences.
    mask_embedding [H]: of P-EAGLE's mask token.
    """

    features: Tensor
    embeddings: Tensor
    angles: Sequence[Tensor]
    packing: Packing | None = None
    mask_embedding: Tensor | None = None

    @classmethod
    def of(
        cls,
        base: EmbeddingOfBase,
        draft: EagleDraft,
        tokens: Tensor,
        features: Tensor,
        *,
        steps: int,
        packing: Packing | None = None,
        mask_embedding: Tensor | None = None,
    ) -> DraftInputs:
        """Make the inputs of whole sequences of tokens [B, S], packed or not, and this rank's
        features. Collectives: one embedding look-up for all steps."""
        spans = ContextShard.of(tokens.shape[1], base.cp_group).spans
        embeddings = step_embeddings(
            tokens,
            base.embedding_weight,
            base.vocab_size,
            steps,
            base.tp_group,
            draft.config.sequence_parallel,
            spans,
        )
        rotary = draft.rotary(tokens.shape[1] + steps - 1)
        if packing is None:
            angles = [query_angles(rotary, spans, step) for step in range(steps)]
        else:
            angles = [packing.angles(rotary, base.cp_group, step) for step in range(steps)]
        return cls(features, embeddings, angles, packing, mask_embedding)

    def embedding(self, step: int) -> Tensor:
        """Return the embeddings [S', B, H] of the tokens that ``step`` consumes."""
        size = self.features.shape[0] // self.embeddings.shape[0]
        return self.embeddings[:, step : step + size].flatten(0, 1)


def query_angles(rotary: Tensor, spans: Sequence[tuple[int, int]], step: int) -> Tensor:
    """Return the RoPE angles of a step's queries: those of positions ``start + step`` to
    ``stop + step`` of each span, out of rotary [S + K - 1, 1, 1, d]."""
    parts = [rotary[start + step : stop + step] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unroll(
    draft: EagleDraft, inputs: DraftInputs, step_rows: Tensor, *, detach_steps: bool = False
) -> Tensor:
    """Run the K steps; return the head's inputs at each step's target rows, [K, M, H], the same on
    every TP rank.

    step_rows [K, M]: flat rows of [S / CP, B]. With ``detach_steps`` no gradient flows through the
    hidden state fed from one step to the next (it still flows through keys and values).
    Collectives: those of :func:`step_outputs`, and over TP once for all steps: under sequence
    parallelism one all-gather (backward: one reduce-scatter), else none (backward: one all-reduce).
    """
    outputs = step_outputs(draft, inputs, detach_steps=detach_steps)
    rows = draft.gather_rows(torch.stack(outputs, dim=1))  # [S / CP, K, B, H]
    del outputs
    flat = rows.transpose(0, 1).flatten(1, 2)  # [K, S / CP * B, H]
    return flat.gather(1, step_rows.unsqueeze(-1).expand(-1, -1, flat.shape[-1]))


def step_outputs(
    draft: EagleDraft, inputs: DraftInputs, *, detach_steps: bool = False
) -> list[Tensor]:
    """Run the K steps; return the head's inputs of all of this rank's rows, [S', B, H] per step.

    Collectives: those of K passes of the draft's layers, or of one for an algorithm that runs all
    steps at once (:func:`parallel_steps`).
    """
    plan = None if inputs.packing is None else inputs.packing.plan(draft.cp_group)
    state = TrunkBranchState(draft.cp_group, plan)
    schedule = Schedule(
        in_turn=lambda: _steps_in_turn(draft, inputs, state, detach_steps),
        at_once=lambda: parallel_steps(draft, inputs, state),
    )
    with nvtx_range("unroll"):
        return draft.algorithm.run(schedule)


def _steps_in_turn(
    draft: EagleDraft, inputs: DraftInputs, state: TrunkBranchState, detach_steps: bool
) -> list[Tensor]:
    outputs: list[Tensor] = []
    hidden = draft.start(inputs.features)
    for step, angles in enumerate(inputs.angles):
        if detach_steps and step:
            hidden = hidden.detach()
        output, hidden = draft.step(inputs.embedding(step), hidden, angles, state)
        outputs.append(output)
    return outputs


class StackedSteps:
    """Attention state for one pass over K steps, stored one after another.

    Splits the pass into steps and hands each to ``state``. Under sequence parallelism the rows come
    as ``parts`` pieces, one per rank, each with all K steps of its rows.
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
