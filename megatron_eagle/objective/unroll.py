"""The K-step unroll of test-time training. START READING HERE.

Query-aligned: row p stays row p. Step t feeds row p its own output of step t - 1 and the embedding
of the true token x_{p+1+t}, at RoPE position p + t, and attends to the step-0 keys 0..p and to its
own row's keys of steps 1..t. Hidden states are never shifted, so a sequence- or context-parallel
shard needs no exchange between steps; gradients flow through all K steps, through hidden states and
keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.attention.core import TrunkBranchState
from megatron_eagle.attention.packing import Packing
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.objective.parallel_steps import parallel_steps
from megatron_eagle.platform.profiling import nvtx_range


@dataclass(frozen=True)
class DraftInputs:
    """What one micro-batch gives the draft; S' is this rank's rows (S, cut over CP, and over TP
    under sequence parallelism).

    features [S', B, A * H]: the captured layers (EAGLE-1: [S', B, H], the final hidden).
    embeddings [R, S' / R + K - 1, B, H]: tokens after each of the R runs of positions that this
    rank holds. rotary [S + K - 1, 1, 1, d]: angles of positions 0 .. S + K - 2. spans: the
    positions (start, stop) that attention sees as queries, those of this rank's context-parallel
    part. packing: the documents of packed sequences. mask_embedding [H]: P-EAGLE's mask token.
    """

    features: Tensor
    embeddings: Tensor
    rotary: Tensor
    spans: Sequence[tuple[int, int]]
    packing: Packing | None = None
    mask_embedding: Tensor | None = None

    def embedding(self, step: int) -> Tensor:
        """[S', B, H]: of the tokens that ``step`` consumes."""
        size = self.features.shape[0] // self.embeddings.shape[0]
        return self.embeddings[:, step : step + size].flatten(0, 1)

    def angles(self, step: int, group: ProcessGroup) -> Tensor:
        """RoPE angles of every query's position at ``step``; ``group`` is context-parallel."""
        if self.packing is not None:
            return self.packing.angles(self.rotary, group, step)
        parts = [self.rotary[start + step : stop + step] for start, stop in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def unroll(
    draft: EagleDraft, inputs: DraftInputs, steps: int, detach_steps: bool = False
) -> list[Tensor]:
    """What the head reads of each of ``steps`` TTT steps, [S', B, H] each.

    With ``detach_steps`` no gradient flows through the hidden fed from one step to the next (it
    still flows through keys and values). Collectives: those of K passes of the draft's layers, for
    P-EAGLE of one (:mod:`megatron_eagle.objective.parallel_steps`).
    """
    plan = None if inputs.packing is None else inputs.packing.plan(draft.cp_group)
    state = TrunkBranchState(draft.cp_group, plan)
    outputs: list[Tensor] = []
    if inputs.mask_embedding is not None:
        angles = [inputs.angles(step, draft.cp_group) for step in range(steps)]
        with nvtx_range("unroll"):
            return parallel_steps(
                draft, inputs.features, inputs.embedding(0), inputs.mask_embedding, angles, state
            )
    with nvtx_range("unroll"):
        hidden = draft.start(inputs.features)
        for step in range(steps):
            output, hidden = draft.step(
                inputs.embedding(step),
                hidden.detach() if detach_steps and step else hidden,
                inputs.angles(step, draft.cp_group),
                state,
            )
            outputs.append(output)
    return outputs


def target_hidden(draft: EagleDraft, outputs: list[Tensor], step_rows: Tensor) -> Tensor:
    """What the head reads of every step at its target rows, [K, M, H], the same on every TP rank.

    step_rows [K, M] flat rows of [S, B], or of this rank's [S / CP, B]. Collectives over TP, once
    for all steps: under sequence parallelism one all-gather (backward: one reduce-scatter), else
    none (backward: one all-reduce).
    """
    full = draft.gather_rows(torch.stack(outputs, dim=1))  # [S, K, B, H]
    flat = full.transpose(0, 1).flatten(1, 2)  # [K, S * B, H]
    index = step_rows.unsqueeze(-1).expand(-1, -1, flat.shape[-1])
    return flat.gather(1, index)
