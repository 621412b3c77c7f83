"""The schedule of a pipeline whose base only runs forward and whose every stage trains the draft.

What a stage does, and when, is :func:`~megatron_eagle.pipeline.plan.stage_actions`;
:class:`~megatron_eagle.pipeline.iteration.PipelineIteration` does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from operator import is_
from typing import Any

from torch import Tensor

from megatron_eagle.compat import get_model_config
from megatron_eagle.pipeline.iteration import Observer, PipelineIteration
from megatron_eagle.platform.profiling import nvtx_range


class PipelineSchedule:
    """A Megatron ``forward_backward_func`` for ``--pipeline-model-parallel-size`` above 1.

    Of the next iteration, if ``another_follows`` says that there is one, its first base forwards
    are run too; they wait here for the next call. They are used if that call's iterator gives the
    very samples they were made of, and forgotten if not (Megatron replays an iteration, or skips
    some). An evaluation in between does not concern them.

    Args:
        observer: see :data:`~megatron_eagle.pipeline.iteration.Observer`.
        another_follows: whether another training iteration follows the one that is called for; the
            same on all ranks.
    """

    def __init__(
        self,
        observer: Observer | None = None,
        another_follows: Callable[[], bool] = lambda: False,
    ) -> None:
        self.observer = observer or (lambda kind, _: nvtx_range(kind))
        self.another_follows = another_follows
        self._begun: PipelineIteration | None = None

    def __call__(
        self,
        *,
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        num_microbatches: int,
        forward_only: bool = False,
        pg_collection: Any = None,
        force_all_reduce: bool = False,
        **_: Any,
    ) -> list[dict[str, Tensor]]:
        """The metric reports of this stage's own micro-batches; arguments are Megatron's."""
        chunk = model[0] if isinstance(model, list) else model
        iterator = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
        config = get_model_config(chunk)
        if config.timers is not None:
            timer = config.timers("forward-backward", log_level=1)
            timer.start(barrier=config.barrier_with_L1_time)
        goes_on = not forward_only and self.another_follows()
        new = partial(PipelineIteration, self.observer, forward_step_func, chunk)
        iteration = new() if forward_only else self._begin(iterator, new)
        rows = iteration.run(iterator, num_microbatches, forward_only, goes_on)
        if not forward_only:
            self._begun = iteration.following
            config.finalize_model_grads_func(
                [chunk], rows, pg_collection=pg_collection, force_all_reduce=force_all_reduce
            )
        if config.timers is not None:
            config.timers("forward-backward").stop()
        return iteration.reports

    def _begin(
        self, iterator: Iterator[Any], new: Callable[..., PipelineIteration]
    ) -> PipelineIteration:
        """The iteration that the last call began, or a ``new`` one."""
        begun, self._begun = self._begun, None
        if begun is None:
            return new()
        samples = [next(iterator) for _ in begun.samples]
        if all(map(is_, samples, begun.samples)):
            return begun
        begun.finish()
        return new(samples)
