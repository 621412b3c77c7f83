"""One decoding forward through the pipeline's stages, after which all of them know what it gave.

All stages hold the same tokens, draft the same from the same captured layers, and take the last
stage's word for a token chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.pipeline.links import Message, StageLinks
from megatron_eagle.teacher.base import FrozenBase


class ForwardPass:
    """One forward of the base through all pipeline stages, which keep their captured layers."""

    def __init__(self, base: FrozenBase, links: StageLinks) -> None:
        self.base, self.links, self.group = base, links, links.group

    @classmethod
    def over(cls, base: FrozenBase, links: StageLinks | None) -> ForwardPass | None:
        """None without ``links``: the base is whole here."""
        return None if links is None else cls(base, links)

    def run(self, tokens: Tensor) -> dict[int, Tensor]:
        """This stage's captured layers, by id, of tokens [B, S]. One message a link."""
        hidden = None
        if not self.links.is_first:
            shape = (self.base.rows(tokens), tokens.shape[0], self.base.config.hidden_size)
            hidden = self.links.receive_hidden(self.base.embedding_weight.new_empty(shape)).wait()
        aux_hidden, out = self.base.run_stage(tokens, hidden)
        if not self.links.is_last:
            self.links.send_hidden(out).wait()
        return aux_hidden


class StageExchange:
    """What stages tell each other while they decode; every method is called by all of them alike.

    Nothing is sent without ``links``, on one stage that has all layers.
    """

    def __init__(self, base: FrozenBase, links: StageLinks | None) -> None:
        self.base, self.links = base, links
        self.config = base.config
        here = base.capture.layers_here
        self.layers_by_stage: list[Any] = [here]
        if links is not None:
            self.layers_by_stage = [None] * links.stages
            torch.distributed.all_gather_object(self.layers_by_stage, here, group=links.group)

    @property
    def count(self) -> int:
        """Pipeline stages."""
        return 1 if self.links is None else self.links.stages

    @property
    def is_first(self) -> bool:
        return self.links is None or self.links.is_first

    def receive(self, rows: int, batch: int) -> Tensor:
        """The hidden states [``rows``, ``batch``, H] of the stage before."""
        assert self.links is not None
        return self.links.receive_hidden(self._buffer(rows, batch, 1)).wait()

    def send(self, hidden: Tensor) -> Message | None:
        """This stage's output, to the next one if there is one."""
        if self.links is None or self.links.is_last:
            return None
        return self.links.send_hidden(hidden)

    def captured(self, aux_hidden: dict[int, Tensor], like: Tensor) -> list[Tensor]:
        """All captured layers in order, from those of this stage; each of the shape of ``like``
        [n, B, H]. One broadcast per stage that has some."""
        found: dict[int, Tensor] = {}
        for stage, layers in enumerate(self.layers_by_stage):
            if layers:
                mine = (
                    torch.cat([aux_hidden[i] for i in layers], dim=-1)
                    if layers[0] in aux_hidden
                    else None
                )
                joined = self._from(stage, mine, like, len(layers))
                found |= zip(layers, joined.chunk(len(layers), dim=-1), strict=True)
        return [found[i] for i in self.base.capture.layers]

    def final(self, output: Tensor) -> Tensor:
        """The last stage's ``output`` [n, B, H]. One broadcast."""
        return self._from(-1, output, output, 1)

    def agreed(self, tokens: Tensor) -> Tensor:
        """The last stage's ``tokens``, which rounding must not make others than here. One
        broadcast."""
        if self.links is None:
            return tokens
        tokens = tokens.contiguous()
        last = self.links.stages - 1
        torch.distributed.broadcast(tokens, group=self.links.group, group_src=last)
        return tokens

    def _from(self, stage: int, mine: Tensor | None, like: Tensor, blocks: int) -> Tensor:
        if self.links is None:
            assert mine is not None
            return mine
        source = stage % self.links.stages
        tensor = mine if source == self.links.stage else None
        if tensor is None:
            tensor = self._buffer(like.shape[0], like.shape[1], blocks)
        tensor = tensor.contiguous()
        torch.distributed.broadcast(tensor, group=self.links.group, group_src=source)
        return tensor

    def _buffer(self, rows: int, batch: int, blocks: int) -> Tensor:
        config = self.config
        return torch.empty(
            rows,
            batch,
            blocks * config.hidden_size,
            dtype=torch.float32 if config.fp32_residual_connection else config.params_dtype,
            device=self.base.embedding_weight.device,
        )
