"""One iteration on one pipeline stage: base forwards, draft steps, and the messages between them.

All stages read the same micro-batches, so every shape is known beforehand.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.compat import backward_step, forward_step, get_model_config, unwrap_model
from megatron_eagle.objective.batch import EagleBatch
from megatron_eagle.pipeline.aux_router import AuxRouter
from megatron_eagle.pipeline.links import Message
from megatron_eagle.pipeline.plan import forwards_ahead, owner_of, stage_actions
from megatron_eagle.pipeline.read_ahead import peek

Observer = Callable[[str, int], AbstractContextManager[Any]]
"""Called with what is about to happen (the kind of an action, or "wait" for a message) and the
number of the micro-batch; entered and left around it."""

SENDS_AHEAD = 2
"""Hidden states that may be under way to the next stage before this one waits."""


class PipelineIteration:
    """One iteration, from its first base forward to its last draft step on this stage.

    Args:
        observer: is told what happens.
        step: Megatron's forward step function.
        chunk: the model, wrapped for data parallelism.
        samples: its first samples, if they are known.
        before: the iteration during whose end this one begins: what that sends is still leaving.
    """

    def __init__(
        self,
        observer: Observer,
        step: Any,
        chunk: Any,
        samples: Sequence[Any] = (),
        before: PipelineIteration | None = None,
    ) -> None:
        self.observer, self.step, self.chunk = observer, step, chunk
        self.samples, self.begun = list(samples), before is not None
        self.config = get_model_config(chunk)
        eagle = unwrap_model(chunk)
        self.base, self.links = eagle.base, eagle.links
        self.router: AuxRouter = AuxRouter(
            self.links,
            self.base.capture.layers,
            eagle.layers_by_stage,
            self.config.hidden_size,
            self._buffer,
            {} if before is None else before.router.leaving,
        )
        self.reports: list[dict[str, Tensor]] = []
        self.following: PipelineIteration | None = None
        self._iterator: Iterator[Any] = iter(())
        self._batches: dict[int, EagleBatch] = {}
        self._read = 0
        self._incoming: Message | None = None
        self._outgoing: deque[Message] = deque() if before is None else before._outgoing

    def run(
        self, iterator: Iterator[Any], micro_batches: int, forward_only: bool, goes_on: bool
    ) -> Tensor:
        """All of it that is left to do; the number of supervised rows of this stage's micro-
        batches. If training ``goes_on``, the ``following`` iteration is begun."""
        stage, stages = self.links.stage, self.links.stages
        self._iterator, last = iterator, micro_batches - 1
        own = deque(range(stage, micro_batches, stages))
        rows = torch.zeros([], dtype=torch.int, device=torch.cuda.current_device())
        if own:
            expected = forwards_ahead(stage, stages) if self.begun else 0
            self.router.expect(own[0], range(expected, stages))
        for kind, micro_batch in stage_actions(
            stage, stages, micro_batches, begun=self.begun, goes_on=goes_on
        ):
            if kind == "base":
                self._run_base(kind, micro_batch, expect_next=micro_batch < last)
                if goes_on and micro_batch == last:
                    self._next(last).expect_hidden(0)
            elif kind == "ahead":
                self._next(last)._run_base(kind, micro_batch, expect_next=True)
            else:
                own.popleft()
                if own:  # so that no sender has to wait for this draft step
                    self.router.expect(own[0], range(stages))
                elif goes_on:
                    self._next(last).expect_aux()
                with self._reduce_after_last(own, forward_only):
                    rows += self._train(micro_batch, forward_only)
        assert not self.router.held
        if not goes_on:
            self.finish()
        return rows

    def expect_hidden(self, micro_batch: int) -> None:
        """Post the receive of what the stage before makes of ``micro_batch``."""
        if not self.links.is_first:
            buffer = self._buffer(micro_batch, self.config.hidden_size)
            self._incoming = self.links.receive_hidden(buffer)

    def expect_aux(self) -> None:
        """Post those receives for this stage's first micro-batch that the iteration before
        sends."""
        stage = self.links.stage
        self.router.expect(stage, range(forwards_ahead(stage, self.links.stages)))

    def finish(self) -> None:
        """Until all that was posted has arrived or left."""
        if self._incoming is not None:
            self._incoming.wait()
        while self._outgoing:
            self._outgoing.popleft().wait()
        self.router.finish()

    def _next(self, last: int) -> PipelineIteration:
        """The iteration after this one, whose samples lie behind that of micro-batch ``last``."""
        if self.following is None:
            self._sample(last)
            samples = peek(self._iterator, self.links.stages)
            self.following = PipelineIteration(
                self.observer, self.step, self.chunk, samples, before=self
            )
        return self.following

    def _run_base(self, kind: str, micro_batch: int, expect_next: bool) -> None:
        batch = self._batches[micro_batch] = self._batch(micro_batch).to(self.device)
        hidden = None
        if not self.links.is_first:
            if self._incoming is None:
                self.expect_hidden(micro_batch)
            assert self._incoming is not None
            with self.observer("wait", micro_batch):
                hidden = self._incoming.wait()
            self._incoming = None
            if expect_next:
                self.expect_hidden(micro_batch + 1)
        with self.observer(kind, micro_batch):
            aux_hidden, out = self.base.run_stage(batch.tokens, hidden, batch.packing)
        if not self.links.is_last:
            if len(self._outgoing) == SENDS_AHEAD:
                with self.observer("wait", micro_batch):
                    self._outgoing.popleft().wait()
            self._outgoing.append(self.links.send_hidden(out))
        self.router.deliver(micro_batch, aux_hidden, out)
        if owner_of(micro_batch, self.links.stages) != self.links.stage:
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
                None,
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

    def _sample(self, micro_batch: int) -> Any:
        while len(self.samples) <= micro_batch:
            self.samples.append(next(self._iterator))
        return self.samples[micro_batch]

    def _batch(self, micro_batch: int) -> EagleBatch:
        while self._read <= micro_batch:
            sample = self._sample(self._read)
            self._batches[self._read] = self.step.read(iter((sample,)))
            self._read += 1
        return self._batches[micro_batch]

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
