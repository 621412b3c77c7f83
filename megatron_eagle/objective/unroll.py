"""The K-step unroll of test-time training. START READING HERE.

Query-aligned: row p stays row p. Step t feeds row p its own output of step t - 1 and the embedding
of the true token x_{p+1+t}, at RoPE position p + t, and attends to the step-0 keys 0..p and to its
own row's keys of steps 1..t. Hidden states are never shifted, so a sequence-parallel shard needs
no exchange between steps; gradients flow through all K steps, through hidden states and keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eagle.attention.core import TrunkBranchState
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.platform.nvtx import nvtx_range


@dataclass(frozen=True)
class DraftInputs:
    """What one micro-batch gives the draft; S' is S, or S / TP under sequence parallelism.

    features [S', B, A * H]: the captured layers. embeddings [S' + K - 1, B, H]: of x_1 onwards,
    step t consuming rows t .. t + S' - 1. rotary [S + K - 1, 1, 1, d]: angles of positions
    0 .. S + K - 2, for the full sequence that attention sees.
    """

    features: Tensor
    embeddings: Tensor
    rotary: Tensor


def unroll(
    draft: EagleDraft, inputs: DraftInputs, steps: int, detach_steps: bool = False
) -> list[Tensor]:
    """The draft's hidden of each of ``steps`` TTT steps, [S', B, H] each, before the final norm.

    With ``detach_steps`` no gradient flows through the hidden fed from one step to the next (it
    still flows through keys and values). Collectives: those of K passes of the draft's layers.
    """
    rows = inputs.features.shape[0]
    positions = inputs.rotary.shape[0] - steps + 1
    state = TrunkBranchState()
    outputs: list[Tensor] = []
    with nvtx_range("unroll"):
        hidden = draft.fc(inputs.features)
        for step in range(steps):
            hidden = draft.step(
                inputs.embeddings[step : step + rows],
                hidden.detach() if detach_steps and step else hidden,
                inputs.rotary[step : step + positions],
                state,
            )
            outputs.append(hidden)
    return outputs


def target_hidden(draft: EagleDraft, outputs: list[Tensor], step_rows: Tensor) -> Tensor:
    """The normed hidden of every step at its target rows, [K, M, H], the same on every TP rank.

    step_rows [K, M] flat rows of the full [S, B]. Collectives over TP, once for all steps: under
    sequence parallelism one all-gather (backward: one reduce-scatter), else none (backward: one
    all-reduce).
    """
    normed = torch.stack([draft.norm(hidden) for hidden in outputs], dim=1)  # [S', K, B, H]
    full = draft.gather_rows(normed)
    flat = full.transpose(0, 1).flatten(1, 2)  # [K, S * B, H]
    index = step_rows.unsqueeze(-1).expand(-1, -1, flat.shape[-1])
    return flat.gather(1, index)
