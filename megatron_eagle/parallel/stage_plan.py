"""In which order a pipeline stage runs the base and trains the draft. Needs no torch.

The base only runs forward, so its micro-batches stream through the stages; micro-batch m is then
trained on by its owner, stage m mod PP. Every stage does the same work per round of PP micro-
batches: PP base forwards of its layers, and one draft step. Stage s is s forwards behind stage 0 at
every point of that cycle, so while one stage trains, its neighbours are about to, and nobody waits
for anybody's draft.
"""

from __future__ import annotations

from dataclasses import dataclass

SLACK = 1
"""Base forwards of the next round that a stage runs before it trains on the last one. At 0 what
the last stage sends would be needed the moment it is sent; more would keep taps for longer."""


@dataclass(frozen=True)
class Action:
    """``kind`` is "base" (this stage's layers of the base) or "draft" (forward, and backward)."""

    kind: str
    micro_batch: int


def owner_of(micro_batch: int, stages: int) -> int:
    """The stage that trains on ``micro_batch``."""
    return micro_batch % stages


def stage_actions(stage: int, stages: int, micro_batches: int, slack: int = SLACK) -> list[Action]:
    """What ``stage`` does in one iteration, in order."""
    own = range(stage, micro_batches, stages)
    due = {m: min((m // stages + 1) * stages - 1 + slack, micro_batches - 1) for m in own}
    actions = []
    for forward in range(micro_batches):
        actions.append(Action("base", forward))
        actions += [Action("draft", m) for m in own if due[m] == forward]
    return actions
