"""The order in which a pipeline stage runs the base and trains the draft. Needs no torch.

The base only runs forward, so its micro-batches stream through the stages; micro-batch m is then
trained on by its owner, stage m mod PP. Every stage does the same work per round of PP micro-
batches: PP base forwards of its layers, and one draft step (forward and backward of one micro-
batch). Stage s is s forwards behind stage 0 at every point of that cycle, so while one stage
trains, its neighbours are about to, and no stage waits for another one's draft.

The base is frozen, so the stream need not stop where an iteration ends: stage s runs PP - 1 - s
forwards of the next iteration ahead, and all stages reach the optimizer step together. All
messages of those forwards have been received by then.
"""

from __future__ import annotations

from typing import NamedTuple

SLACK = 1
"""Base forwards of the next round that a stage runs before it trains on the last one. At 0 the
last stage's outputs would be needed the moment they are sent; more would hold them for longer."""


class Action(NamedTuple):
    """One unit of a stage's work. ``kind`` is "base" (this stage's layers of the base), "draft"
    (the draft's forward and backward) or "ahead" (the base for a micro-batch of the next
    iteration)."""

    kind: str
    micro_batch: int


def owner_of(micro_batch: int, stages: int) -> int:
    """Return the stage that trains on ``micro_batch``."""
    return micro_batch % stages


def forwards_ahead(stage: int, stages: int) -> int:
    """Return how many base forwards of the next iteration ``stage`` runs before this one ends."""
    return stages - 1 - stage


def stage_actions(
    stage: int,
    stages: int,
    micro_batches: int,
    slack: int = SLACK,
    was_ahead: bool = False,
    runs_ahead: bool = False,
) -> list[Action]:
    """Return what ``stage`` does in one iteration, in order.

    Args:
        was_ahead: whether the iteration before has run this one's first forwards ahead.
        runs_ahead: whether this iteration runs those of the next one.
    """
    ahead = forwards_ahead(stage, stages)
    forwards = [Action("base", m) for m in range(ahead if was_ahead else 0, micro_batches)]
    forwards += [Action("ahead", m) for m in range(ahead if runs_ahead else 0)]
    owned = range(stage, micro_batches, stages)
    last = micro_batches - 1 + (ahead if runs_ahead else 0)
    due = {m: min((m // stages + 1) * stages - 1 + slack, last) for m in owned}
    actions = []
    for position, forward in enumerate(forwards, start=last + 1 - len(forwards)):
        actions.append(forward)
        actions += [Action("draft", m) for m in owned if due[m] == position]
    return actions
