"""Keep what a draft needs of a model's own forward, by hooks: nothing is run twice.

Shapes: B micro-batch, S sequence (S / CP tokens of it on this context-parallel rank), S' this
rank's hidden states (cut over TP once more under sequence parallelism), H hidden size, A aux
layers, Vp this rank's rows of the padded vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from megatron_eagle.attached.model_kinds import ends_of_model
from megatron_eagle.errors import UserError
from megatron_eagle.teacher.base import AuxCapture, BaseOutputs


@dataclass(frozen=True)
class CapturedForward:
    """One forward of the model, detached from its graph.

    Attributes:
        tokens: ``input_ids`` [B, S / CP] as the trainer passed them.
        position_ids: as the trainer passed them, or None.
        packed_seq_params: Megatron's description of packed sequences, or None.
        other_inputs: whether ``decoder_input`` came in place of the tokens' embeddings.
        outputs: aux hidden states and final hidden, [S', B, A * H] and [S', B, H].
        embedding_weight, output_weight: [Vp, H], the weights that this forward used.
    """

    tokens: Tensor
    position_ids: Tensor | None
    packed_seq_params: Any
    other_inputs: bool
    outputs: BaseOutputs
    embedding_weight: Tensor
    output_weight: Tensor


def embedding_weight(gpt: Any) -> Tensor:
    """Return the detached rows [Vp, H] of the word embedding on this rank."""
    return gpt.embedding.word_embeddings.weight.detach()


def output_weight(gpt: Any) -> Tensor:
    """Return the detached rows [Vp, H] of the output layer on this rank: the embedding's if the
    model ties the two."""
    if gpt.share_embeddings_and_output_weights:
        return gpt.shared_embedding_or_output_weight().detach()
    return gpt.output_layer.weight.detach()


class ForwardCapture:
    """Hooks on a GPTModel or HybridModel that is whole on this rank.

    The decoder's output is captured rather than the output layer's input: beside MTP layers, the
    output layer runs once more for each. Layers that activation recomputation runs again, in
    backward, are outside the model's forward, and nothing is kept of them. A forward with an
    inference context is a rollout and passes unseen.
    """

    _measuring: ClassVar[bool] = False

    def __init__(self, gpt: Any, aux_layers: Sequence[int]) -> None:
        self._gpt = gpt
        self._signature = inspect.signature(gpt.forward)
        self.aux = AuxCapture(gpt.decoder, aux_layers, ends_of_model(gpt))
        self.aux.enabled = False
        self._call: dict[str, Any] = {}
        self._final: Tensor | None = None
        self._captured: CapturedForward | None = None
        self._forwards, self._paused = 0, False
        self._handles = [
            *self.aux.handles,
            gpt.register_forward_pre_hook(self._before, with_kwargs=True),
            gpt.decoder.register_forward_hook(self._keep_final),
            gpt.register_forward_hook(self._after),
        ]

    def take(self) -> CapturedForward:
        """Return the forward since the last call, and forget it.

        Raises ``UserError`` unless there was exactly one.
        """
        captured, forwards = self._captured, self._forwards
        self._captured, self._forwards = None, 0
        if captured is None:
            raise UserError(
                "the draft's loss needs a forward of the model before it, and there was none since "
                "the last loss (a paused or inference forward does not count)"
            )
        if forwards > 1:
            raise UserError(
                f"{forwards} forwards of the model since the draft's last loss, which would learn "
                "from the last one alone: ask for a loss after each, or run the others inside "
                "paused()"
            )
        return captured

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let forwards inside the context pass unseen."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def aux_hidden(self) -> Iterator[AuxCapture]:
        """Keep the aux hidden states of a forward inside the context, and nothing else; other
        drafts beside the same model do not see it."""
        self.aux.enabled = ForwardCapture._measuring = True
        try:
            yield self.aux
        finally:
            self.aux.enabled = ForwardCapture._measuring = False

    def _before(self, _module: Any, args: Any, kwargs: Any) -> None:
        if self._paused or self._measuring:
            return
        call = self._signature.bind(*args, **kwargs).arguments
        if call.get("inference_context") is None and call.get("inference_params") is None:
            self._call, self._captured, self._final = call, None, None
            self.aux.enabled = True

    def _keep_final(self, _module: Any, _inputs: Any, output: Any) -> None:
        if self._call:
            hidden = output[0] if isinstance(output, tuple) else output
            self._final = hidden.detach()

    def _after(self, _module: Any, _inputs: Any, _output: Any) -> None:
        if not self._call:
            return
        call, self._call = self._call, {}
        self.aux.enabled = False
        aux_hidden = self.aux.take()
        assert self._final is not None, "the decoder was not run"
        self._captured = CapturedForward(
            tokens=call["input_ids"],
            position_ids=call.get("position_ids"),
            packed_seq_params=call.get("packed_seq_params"),
            other_inputs=call.get("decoder_input") is not None,
            outputs=BaseOutputs.of([aux_hidden[i] for i in self.aux.layers], self._final),
            embedding_weight=embedding_weight(self._gpt),
            output_weight=output_weight(self._gpt),
        )
        self._final = None
        self._forwards += 1
