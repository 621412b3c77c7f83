"""In which order a pipeline stage runs the base and trains the draft. Needs no torch.

The base only runs forward, so its micro-batches stream through the stages; micro-batch m is then
trained on by its owner, stage m mod PP. Every stage does the same work per round of PP micro-
batches: PP base forwards of its layers, and one draft step. Stage s is s forwards behind stage 0 at
every point of that cycle, so while one stage trains, its neighbours are about to, and nobody waits
for anybody's draft.

The base is frozen, so the stream need not stop where an iteration ends: stage s goes on with
PP - 1 - s forwards of the next one, and all stages reach the optimizer step together. What they
send each other of those forwards has all been received by then.
"""

from __future__ import annotations

from typing import NamedTuple

SLACK = 1
"""Base forwards of the next round that a stage runs before it trains on the last one. At 0 what
the last stage sends would be needed the moment it is sent; more would keep them for longer."""


class Action(NamedTuple):
    """``kind`` is "base" (this stage's layers of the base), "draft" (forward, and backward) or
    "ahead" (the base for a micro-batch of the next iteration)."""

    kind: str
    micro_batch: int


def owner_of(micro_batch: int, stages: int) -> int:
    """The stage that trains on ``micro_batch``."""
    return micro_batch % stages


def forwards_ahead(stage: int, stages: int) -> int:
    """The base forwards of the next iteration that ``stage`` runs before this one ends."""
    return stages - 1 - stage


def stage_actions(
    stage: int,
    stages: int,
    micro_batches: int,
    slack: int = SLACK,
    begun: bool = False,
    goes_on: bool = False,
) -> list[Action]:
    """What ``stage`` does in one iteration, in order: an iteration that the one before has
    ``begun``, and that ``goes_on`` with the next one's first forwards."""
    ahead = forwards_ahead(stage, stages)
    forwards = [Action("base", m) for m in range(ahead if begun else 0, micro_batches)]
    forwards += [Action("ahead", m) for m in range(ahead if goes_on else 0)]
    own = range(stage, micro_batches, stages)
    last = micro_batches - 1 + (ahead if goes_on else 0)
    due = {m: min((m // stages + 1) * stages - 1 + slack, last) for m in own}
    actions = []
    for position, forward in enumerate(forwards, start=last + 1 - len(forwards)):
        actions.append(forward)
        actions += [Action("draft", m) for m in own if due[m] == position]
    return actions
