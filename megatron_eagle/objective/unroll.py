"""The K-step unroll of test-time training (TTT).

Every position keeps its row: row p of step t belongs to position p. Step t feeds row p its own
output of step t - 1 and the embedding of the true token x_{p+1+t}, at RoPE position p + t, and
attends to the step-0 keys 0..p and to its own row's keys of steps 1..t. Hidden states are never
shifted, so a sequence- or context-parallel shard needs no exchange between steps; gradients flow
through all K steps, through hidden states and keys.

Of a row that no step judges, others read the step-0 keys and values alone. So all rows run up to
the last layer's keys and values of step 0, and the live rows (attention/live_rows.py) go on alone:

    step 0, layers but the last    all rows
    step 0, last layer             keys and values of all rows; queries and all after them live rows
    steps 1 .. K - 1               live rows

Where nearly all rows are judged, all count as live and keep their places.

S sequence, S' this rank's tokens (S cut over CP, and over TP under sequence parallelism), B
micro-batch, H hidden, K TTT steps, M supervised target positions, N live rows, N' this rank's part
of them under sequence parallelism (otherwise N).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from megatron_eagle.algorithms import Schedule
from megatron_eagle.attention.core import TrunkBranchState
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.objective.inputs import DraftInputs
from megatron_eagle.objective.parallel_steps import parallel_steps
from megatron_eagle.platform.profiling import nvtx_range


def unroll(
    draft: EagleDraft, inputs: DraftInputs, step_rows: Tensor, *, detach_steps: bool = False
) -> Tensor:
    """Run the K steps; return the head's inputs at each step's target rows, [K, M, H], the same on
    every TP rank.

    step_rows [K, M]: places among the live rows. With ``detach_steps`` no gradient flows through
    the hidden state fed from one step to the next (it still flows through keys and values).
    Collectives: those of :func:`step_outputs`, and over TP once for all steps: under sequence
    parallelism one all-gather (backward: one reduce-scatter), else none (backward: one all-reduce).
    """
    outputs = step_outputs(draft, inputs, detach_steps=detach_steps)
    rows = draft.gather_rows(torch.cat(outputs, dim=1))  # [N, K, H]
    del outputs
    flat = rows.transpose(0, 1)
    return flat.gather(1, step_rows.unsqueeze(-1).expand(-1, -1, flat.shape[-1]))


def step_outputs(
    draft: EagleDraft, inputs: DraftInputs, *, detach_steps: bool = False
) -> list[Tensor]:
    """Run the K steps; return the head's inputs of this rank's live rows, [N', 1, H] per step.

    Collectives: those of K passes of the draft's layers, or of one for an algorithm that runs all
    steps at once (:func:`parallel_steps`); under sequence parallelism one all-gather more, when the
    live rows are shared out (backward: one reduce-scatter).
    """
    last_layer = cast(int, draft.layers[-1].layer_number)
    state = TrunkBranchState(draft.cp_group, inputs.live, last_layer, inputs.packing)
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
        narrow_to = None if step or inputs.live.whole else inputs.live
        output, hidden = draft.step(inputs.embedding(step), hidden, angles, state, narrow_to)
        outputs.append(output.flatten(0, 1).unsqueeze(1))
    return outputs
