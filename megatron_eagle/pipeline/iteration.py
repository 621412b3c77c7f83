"""One iteration on one pipeline stage: base forwards and draft steps, in the plan's order."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_eagle.compat import backward_step, forward_step, get_model_config
from megatron_eagle.pipeline.base_stream import BaseStream
from megatron_eagle.pipeline.plan import stage_actions


class IterationResult(NamedTuple):
    """Number of supervised tokens this stage trained on, metric reports of its micro-batches, and
    the stream whose first forwards were run ahead (None if none were)."""

    tokens: Tensor
    reports: list[dict[str, Tensor]]
    ahead: BaseStream | None


class PipelineIteration:
    """One iteration, from its first base forward that was not run ahead to its last draft step.

    Args:
        step: Megatron's forward step function.
        chunk: the model, wrapped for data parallelism.
        stream: the iteration's base forwards on this stage, started.
        micro_batches: how many there are, on all stages together.
        forward_only: whether the draft is evaluated instead of trained.
        runs_ahead: whether the next iteration's first base forwards are run too.
    """

    def __init__(
        self,
        step: Any,
        chunk: Any,
        stream: BaseStream,
        micro_batches: int,
        forward_only: bool,
        runs_ahead: bool,
    ) -> None:
        self.step, self.chunk, self.config = step, chunk, get_model_config(chunk)
        self.stream, self.micro_batches = stream, micro_batches
        self.forward_only, self.runs_ahead = forward_only, runs_ahead
        self.reports: list[dict[str, Tensor]] = []
        self._ahead: BaseStream | None = None

    def run(self) -> IterationResult:
        """Run all actions that this stage's plan has for the iteration."""
        stage, stages = self.stream.exchange.stage, self.stream.exchange.stages
        owned = deque(range(stage, self.micro_batches, stages))
        tokens = torch.zeros([], dtype=torch.int, device=torch.cuda.current_device())
        if owned:
            self.stream.expect_outputs(owned[0])
        for kind, micro_batch in stage_actions(
            stage,
            stages,
            self.micro_batches,
            was_ahead=self.stream.was_ahead,
            runs_ahead=self.runs_ahead,
        ):
            if kind == "base":
                self.stream.run(kind, micro_batch)
                if self.runs_ahead and micro_batch == self.micro_batches - 1:
                    self._next_stream().expect_hidden(0)
            elif kind == "ahead":
                self._next_stream().run(kind, micro_batch)
            else:
                owned.popleft()
                if owned:  # so that no sender has to wait for this draft step
                    self.stream.expect_outputs(owned[0])
                elif self.runs_ahead:
                    self._next_stream().expect_outputs_ahead()
                with self._reduce_after_last(is_last=not owned):
                    tokens += self._train(micro_batch)
        assert not self.stream.router.held
        if not self.runs_ahead:
            self.stream.finish()
        return IterationResult(tokens, self.reports, self._ahead)

    def _next_stream(self) -> BaseStream:
        if self._ahead is None:
            self._ahead = self.stream.next_iteration()
        return self._ahead

    def _train(self, micro_batch: int) -> Tensor:
        """Run the draft on ``micro_batch``, forward and (unless ``forward_only``) backward; return
        its number of supervised tokens."""
        batch, outputs = self.stream.collect(micro_batch)

        def step(_: Iterator[Any], model: Any) -> tuple[Any, Any]:
            return model(batch, outputs), self.step.loss

        with self.stream.observer("draft", micro_batch):
            loss, tokens = forward_step(
                step,
                None,
                self.chunk,
                1,
                None,
                self.reports,
                self.config,
                self.stream.exchange.base.cp_group.size(),
                current_microbatch=micro_batch,
            )
            if not self.forward_only:
                backward_step(None, loss, None, self.config)
        return tokens

    def _reduce_after_last(self, is_last: bool) -> AbstractContextManager[Any]:
        """Keep data-parallel ranks from reducing gradients before this stage's last micro-batch."""
        no_sync = self.config.no_sync_func
        if no_sync is None or self.forward_only or is_last:
            return contextlib.nullcontext()
        return no_sync()
