"""The schedule of a pipeline whose base only runs forward and whose every stage trains the draft.

What a stage does, and when, is :func:`~megatron_eagle.parallel.stage_plan.stage_actions`; this file
does it. All stages read the same micro-batches, so every shape is known beforehand.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.compat import backward_step, forward_step, get_model_config, unwrap_model
from megatron_eagle.objective.batch import EagleBatch
from megatron_eagle.parallel.stage_links import Message
from megatron_eagle.parallel.stage_plan import stage_actions
from megatron_eagle.platform.nvtx import nvtx_range
from megatron_eagle.teacher.routing import TapRouter

Observer = Callable[[str, int], AbstractContextManager[Any]]
"""Called with what is about to happen ("base", "draft", or "wait" for a message) and the number of
the micro-batch; entered and left around it."""

SENDS_AHEAD = 2
"""Hidden states that may be under way to the next stage before this one waits."""


class PipelineSchedule:
    """A Megatron ``forward_backward_func`` for ``--pipeline-model-parallel-size`` above 1."""

    def __init__(self, observer: Observer | None = None) -> None:
        self.observer = observer or (lambda kind, _: nvtx_range(kind))

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
        config = get_model_config(chunk)
        if config.timers is not None:
            timer = config.timers("forward-backward", log_level=1)
            timer.start(barrier=config.barrier_with_L1_time)
        iteration = _Iteration(self.observer, forward_step_func, data_iterator, chunk)
        rows = iteration.run(num_microbatches, forward_only)
        if not forward_only:
            config.finalize_model_grads_func(
                [chunk], rows, pg_collection=pg_collection, force_all_reduce=force_all_reduce
            )
        if config.timers is not None:
            config.timers("forward-backward").stop()
        return iteration.reports


class _Iteration:
    """One call of the schedule on this stage."""

    def __init__(self, observer: Observer, step: Any, iterator: Any, chunk: Any) -> None:
        self.observer, self.step, self.chunk = observer, step, chunk
        self.iterator = iterator[0] if isinstance(iterator, list) else iterator
        self.config = get_model_config(chunk)
        eagle = unwrap_model(chunk)
        self.base, self.links = eagle.base, eagle.links
        self.router = TapRouter(
            self.links,
            self.base.taps.layers,
            eagle.layers_by_stage,
            self.config.hidden_size,
            self._buffer,
        )
        self.reports: list[dict[str, Tensor]] = []
        self._batches: dict[int, EagleBatch] = {}
        self._read = 0
        self._incoming: Message | None = None
        self._outgoing: deque[Message] = deque()

    def run(self, micro_batches: int, forward_only: bool) -> Tensor:
        """Do all actions; the number of supervised rows of this stage's micro-batches."""
        stage, stages = self.links.stage, self.links.stages
        own = deque(range(stage, micro_batches, stages))
        rows = torch.zeros([], dtype=torch.int, device=torch.cuda.current_device())
        if own:
            self.router.expect(own[0])
        for action in stage_actions(stage, stages, micro_batches):
            if action.kind == "base":
                self._run_base(action.micro_batch, micro_batches)
                continue
            own.popleft()
            if own:
                self.router.expect(own[0])  # so that no sender has to wait for this draft step
            with self._reduce_after_last(own, forward_only):
                rows += self._train(action.micro_batch, forward_only)
        for message in self._outgoing:
            message.wait()
        self.router.finish()
        return rows

    def _run_base(self, micro_batch: int, micro_batches: int) -> None:
        batch = self._batches[micro_batch] = self._batch(micro_batch).to(self.device)
        hidden = None
        if not self.links.is_first:
            incoming = self._incoming or self._receive_hidden(micro_batch)
            with self.observer("wait", micro_batch):
                hidden = incoming.wait()
            following = micro_batch + 1
            self._incoming = self._receive_hidden(following) if following < micro_batches else None
        with self.observer("base", micro_batch):
            taps, out = self.base.run_stage(batch.tokens, hidden, batch.packing)
        if not self.links.is_last:
            if len(self._outgoing) == SENDS_AHEAD:
                with self.observer("wait", micro_batch):
                    self._outgoing.popleft().wait()
            self._outgoing.append(self.links.send_hidden(out))
        self.router.deliver(micro_batch, taps, out)
        if micro_batch % self.links.stages != self.links.stage:
            del self._batches[micro_batch]

    def _train(self, micro_batch: int, forward_only: bool) -> Tensor:
        with self.observer("wait", micro_batch):
            outputs = self.router.collect(micro_batch)
        batch = self._batches.pop(micro_batch)

        def step(_: Iterator[Any], model: Any) -> tuple[Any, Any]:
            return model(batch, outputs), self.step.loss

        with self.observer("draft", micro_batch):
            loss, rows = forward_step(
                step,
                self.iterator,
                self.chunk,
                1,
                None,
                self.reports,
                self.config,
                self.base.cp_group.size(),
                current_microbatch=micro_batch,
            )
            if not forward_only:
                backward_step(None, loss, None, self.config)
        return rows

    def _reduce_after_last(self, left: Any, forward_only: bool) -> AbstractContextManager[Any]:
        """Gradients meet the data-parallel ranks with this stage's last micro-batch."""
        no_sync = self.config.no_sync_func
        if no_sync is None or forward_only or not left:
            return contextlib.nullcontext()
        return no_sync()

    def _batch(self, micro_batch: int) -> EagleBatch:
        while self._read <= micro_batch:
            self._batches[self._read] = self.step.read(self.iterator)
            self._read += 1
        return self._batches[micro_batch]

    def _receive_hidden(self, micro_batch: int) -> Message:
        return self.links.receive_hidden(self._buffer(micro_batch, self.config.hidden_size))

    def _buffer(self, micro_batch: int, width: int) -> Tensor:
        """An uninitialised [S', B, width] for what another stage sends of ``micro_batch``."""
        tokens = self._batch(micro_batch).tokens
        dtype = torch.float32 if self.config.fp32_residual_connection else self.config.params_dtype
        return torch.empty(
            self.base.rows(tokens), tokens.shape[0], width, dtype=dtype, device=self.device
        )

    @property
    def device(self) -> torch.device:
        return self.base.embedding_weight.device
