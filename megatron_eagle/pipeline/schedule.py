"""The schedule of a pipeline whose base only runs forward and whose every stage trains the draft.

``plan.stage_actions`` says what a stage does, and when; ``PipelineIteration`` does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from operator import is_
from typing import Any

from torch import Tensor

from megatron_eagle.compat import get_model_config, unwrap_model
from megatron_eagle.pipeline.base_stream import BaseStream, Observer
from megatron_eagle.pipeline.iteration import PipelineIteration
from megatron_eagle.platform.profiling import nvtx_range


class PipelineSchedule:
    """A Megatron ``forward_backward_func`` for several pipeline stages.

    If ``another_follows`` says that there is a next iteration, its first base forwards are run
    ahead, at the end of this one; they wait here for the next call. They are used if that call's
    iterator gives the very samples they were made of, and forgotten if not (Megatron replays an
    iteration, or skips some). An evaluation in between does not concern them.

    Args:
        observer: see ``base_stream.Observer``; by default NVTX ranges.
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
        self._ahead: BaseStream | None = None

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
        """Run one iteration on this stage, and return the metric reports of the micro-batches it
        trained on; arguments are Megatron's."""
        chunk = model[0] if isinstance(model, list) else model
        iterator = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
        config = get_model_config(chunk)
        if config.timers is not None:
            timer = config.timers("forward-backward", log_level=1)
            timer.start(barrier=config.barrier_with_L1_time)
        runs_ahead = not forward_only and self.another_follows()
        exchange = unwrap_model(chunk).exchange
        new = partial(BaseStream, exchange, forward_step_func.read, self.observer)
        stream = new() if forward_only else self._stream(iterator, new)
        stream.start(iterator, num_microbatches)
        tokens, reports, ahead = PipelineIteration(
            forward_step_func, chunk, stream, num_microbatches, forward_only, runs_ahead
        ).run()
        if not forward_only:
            self._ahead = ahead
            config.finalize_model_grads_func(
                [chunk], tokens, pg_collection=pg_collection, force_all_reduce=force_all_reduce
            )
        if config.timers is not None:
            config.timers("forward-backward").stop()
        return reports

    def finish(self) -> None:
        """Wait for the messages of forwards that were run ahead, and forget what they brought. All
        ranks call it when training ends early, by a signal or after a time: messages that are still
        under way must not meet the end of their process groups."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.finish()

    def _stream(self, iterator: Iterator[Any], new: Callable[..., BaseStream]) -> BaseStream:
        """Return the stream that the last call ran ahead, if its samples are still the next ones,
        and else a ``new`` one."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return new()
        expected = ahead.batches.samples
        samples = [next(iterator) for _ in expected]
        if all(map(is_, samples, expected)):
            return ahead
        ahead.finish()
        return new(samples)
