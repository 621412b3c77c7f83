"""``--check-for-spiky-loss``: Megatron's rerun machine is told of a loss far above earlier ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from megatron.core import rerun_state_machine as module

from megatron_eagle.config import EagleConfig
from megatron_eagle.objective.metrics import MetricSums
from megatron_eagle.training.step import ForwardStep

STEPS = 2


@pytest.fixture
def machine() -> Iterator[module.RerunStateMachine]:
    module.initialize_rerun_state_machine(mode=module.RerunMode.VALIDATE_RESULTS)
    machine = module.get_rerun_state_machine()
    machine.state, machine.first_iteration_complete = module.RerunState.INITIAL_RUN, True
    yield machine
    module.destroy_rerun_state_machine()


def _sums(tokens: int) -> torch.Tensor:
    sums = MetricSums.zeros(STEPS, torch.device("cpu"))
    sums.rows.fill_(tokens)
    return sums.pack()


@pytest.mark.parametrize("checks", [False, True])
def test_a_spike_is_one_of_the_mean(machine: module.RerunStateMachine, checks: bool) -> None:
    """Of 100 micro-batches of one token each and a loss of 2; then of 50 tokens."""
    step = ForwardStep(EagleConfig.of(ttt_steps=STEPS), vocab_size=10, rejects_spikes=checks)
    for _ in range(100):
        step.loss((torch.tensor(2.0), _sums(tokens=1)))
    step.loss((torch.tensor(100.0), _sums(tokens=50)))
    assert not machine.rerun_requested
    loss, divisor, _ = step.loss((torch.tensor(1050.0), _sums(tokens=50)))
    assert machine.rerun_requested is checks
    assert (loss.item(), divisor.item()) == (1050.0, 50)
