"""One training step as Megatron calls it: forward step, loss function, metrics once per step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_args
from torch import Tensor

from megatron_eagle.compat import patch, require
from megatron_eagle.config import EagleConfig
from megatron_eagle.objective.accounting import accounting_of
from megatron_eagle.objective.block_batch import AnyBatch
from megatron_eagle.pipeline.schedule import PipelineSchedule
from megatron_eagle.platform.profiling import nvtx_range
from megatron_eagle.training.block_data import next_block_batch
from megatron_eagle.training.data import next_batch
from megatron_eagle.training.throughput import Throughput

_SCHEDULE = "megatron.training.training:get_forward_backward_func"
_SUMS = "eagle_sums"
_SPIKE = 10.0


class ForwardStep:
    """Megatron's ``forward_step_func``: one micro-batch through base and draft.

    ``samples``: at most how many an optimizer step has, on all ranks together. ``throughput``
    counts the micro-batches' work. With ``rejects_spikes`` a loss far above earlier ones is told to
    Megatron's rerun machine.
    """

    def __init__(
        self,
        options: EagleConfig,
        vocab_size: int,
        samples: int = 1,
        throughput: Throughput | None = None,
        *,
        rejects_spikes: bool = False,
    ) -> None:
        self.options, self.vocab_size, self.throughput = options, vocab_size, throughput
        self.accounting = accounting_of(options, samples)
        self.rejects_spikes = rejects_spikes

    def __call__(self, iterator: Any, model: Any) -> tuple[Any, Callable[..., Any]]:
        return model(self.read(iterator).to(torch.cuda.current_device())), self.loss

    def read(self, iterator: Any) -> AnyBatch:
        """Read the next micro-batch, on the host."""
        if self.options.spec.method.drafts_blocks:
            return next_block_batch(iterator, self.options, self.vocab_size)
        # A MoE draft balances its experts over all tokens.
        every_row = self.options.spec.num_experts is not None
        batch = next_batch(iterator, self.options.train.ttt_steps, self.vocab_size, every_row)
        if self.throughput is not None:
            self.throughput.read(batch)
        return batch

    def loss(self, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the sum of losses, what it is divided by (the tokens supervised at step 0), and
        the metric sums. Megatron divides the summed gradients by that of the whole global batch.

        A loss that is not a number needs no check here: it is found in its gradients."""
        loss, sums = output
        unit = self.accounting.unit
        divisor = (self.accounting.divisor(sums) * unit).round().to(torch.int)
        if self.rejects_spikes:  # of the mean: micro-batches have different numbers of tokens
            reject_spike(loss.detach() * unit / divisor.clamp(min=1))
        return (loss if unit == 1 else loss * unit), divisor, {_SUMS: sums}


def reject_spike(loss: Tensor) -> None:
    """Tell Megatron's rerun machine of a loss ten times as large as any of the first 100; asks the
    device for it."""
    machine = require("megatron.core.rerun_state_machine:get_rerun_state_machine")()
    machine.validate_result(
        result=loss,
        rejection_func=partial(machine.is_unexpectedly_large, threshold=_SPIKE, context="loss"),
        message="Spiky loss",
        tolerance=0.0,
        fatal=False,
    )


def replace_schedule(options: EagleConfig) -> PipelineSchedule:
    """Make the schedule (Megatron's, or PipelineSchedule with pipeline stages) return one dict of
    finished metrics. Returns the PipelineSchedule, to be finished when training ends.

    Megatron would reduce every logged value by a collective of its own; here the micro-batches'
    sums meet the other ranks in a single all-reduce. Must run before ``pretrain()``.
    """
    get_schedule, accounting = require(_SCHEDULE), accounting_of(options)
    pipeline = PipelineSchedule(another_follows=_another_iteration_follows)

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        stages = mpu.get_pipeline_model_parallel_world_size()
        schedule = pipeline if stages > 1 else get_schedule(*args, **kwargs)

        def forward_backward(**call: Any) -> list[dict[str, Tensor]]:
            with nvtx_range("forward_backward"):
                reports = schedule(**call)
            sums = [report[_SUMS] for report in reports]
            if not sums:  # an evaluation of fewer micro-batches than stages
                sums = [accounting.zeros(torch.cuda.current_device())]
            groups = (
                mpu.get_data_parallel_group(with_context_parallel=True),
                mpu.get_pipeline_model_parallel_group(),
            )
            return [accounting.reduce(sums, groups)]

        return forward_backward

    patch(_SCHEDULE, get_forward_backward_func, "stages train the draft, metrics meet once")
    return pipeline


def _another_iteration_follows() -> bool:
    """Tell whether the next iteration is trained on, as far as the flags say."""
    args = get_args()
    done = args.curr_iteration + 1
    exits = args.exit_interval is not None and done % args.exit_interval == 0
    left_out = done + 1 in args.iterations_to_skip
    return done < args.train_iters and not exits and not left_out
