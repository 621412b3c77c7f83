"""One training step as Megatron calls it: forward step, loss function, metrics once per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_args
from torch import Tensor

from megatron_eagle.compat import patch, require
from megatron_eagle.config import EagleConfig
from megatron_eagle.objective.batch import EagleBatch
from megatron_eagle.objective.metrics import MetricSums, reduce_metrics
from megatron_eagle.pipeline.schedule import PipelineSchedule
from megatron_eagle.platform.profiling import nvtx_range
from megatron_eagle.training.data import next_batch

_SCHEDULE = "megatron.training.training:get_forward_backward_func"
_SUMS = "eagle_sums"


class ForwardStep:
    """Megatron's ``forward_step_func``: one micro-batch through base and draft."""

    def __init__(self, options: EagleConfig, vocab_size: int) -> None:
        self.options, self.vocab_size = options, vocab_size

    def __call__(self, iterator: Any, model: Any) -> tuple[Any, Callable[..., Any]]:
        return model(self.read(iterator).to(torch.cuda.current_device())), self.loss

    def read(self, iterator: Any) -> EagleBatch:
        """Read the next micro-batch, on the host."""
        # A MoE draft balances its experts over all tokens.
        every_row = self.options.spec.num_experts is not None
        return next_batch(iterator, self.options.train.ttt_steps, self.vocab_size, every_row)

    def loss(self, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the sum of losses, the tokens supervised at step 0, and the metric sums. Megatron
        divides the summed gradients by the tokens of the whole global batch."""
        loss, sums = output
        rows = MetricSums.unpack(sums).rows[0].to(torch.int)
        return loss, rows, {_SUMS: sums}


def replace_schedule(options: EagleConfig) -> None:
    """Make the schedule (Megatron's, or PipelineSchedule with pipeline stages) return one dict of
    finished metrics.

    Megatron would reduce every logged value by a collective of its own; here the micro-batches'
    sums meet the other ranks in a single all-reduce. Must run before ``pretrain()``.
    """
    get_schedule = require(_SCHEDULE)
    pipeline = PipelineSchedule(another_follows=_another_iteration_follows)

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        stages = mpu.get_pipeline_model_parallel_world_size()
        schedule = pipeline if stages > 1 else get_schedule(*args, **kwargs)

        def forward_backward(**call: Any) -> list[dict[str, Tensor]]:
            with nvtx_range("forward_backward"):
                reports = schedule(**call)
            sums = [report[_SUMS] for report in reports]
            if not sums:  # an evaluation of fewer micro-batches than stages
                device = torch.cuda.current_device()
                sums = [MetricSums.zeros(options.train.ttt_steps, device).pack()]
            groups = (
                mpu.get_data_parallel_group(with_context_parallel=True),
                mpu.get_pipeline_model_parallel_group(),
            )
            return [
                reduce_metrics(
                    sums,
                    options.train.ttt_steps,
                    options.train.step_decay,
                    options.regression_weight,
                    groups,
                )
            ]

        return forward_backward

    patch(_SCHEDULE, get_forward_backward_func, "stages train the draft, metrics meet once")


def _another_iteration_follows() -> bool:
    """Tell whether training goes on after the current iteration, as far as the flags say."""
    args = get_args()
    done = args.curr_iteration + 1
    exits = args.exit_interval is not None and done % args.exit_interval == 0
    return done < args.train_iters and not exits
