"""The heads of DSpark: a Markov head on the token before, and how likely a slot is accepted.

The Markov head adds W2 e' to a slot's logits, where e' is made of e = W1[token before]: e itself
(vanilla), e times a gate of the hidden state (gated), or the output of a small recurrent network
along the block (rnn). W1 has a row for every id of the base, W2 one for every id of the draft.

Shape letters: N blocks of B rows (under sequence parallelism this rank's, where named so), H
hidden, r rank, Vp and Dp this rank's shards of the base's and the draft's vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.checkpoint.sharded_tensors import sharded_tensors
from megatron_eagle.compat import (
    MegatronModule,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron_eagle.draft.features import empty_parameter
from megatron_eagle.parallel.products import linear
from megatron_eagle.parallel.vocab import VocabShard

WIDTHS: dict[str, tuple[int, int] | None] = {
    "vanilla": None,
    "gated": (1, 1),
    "rnn": (3, 2),
}
"""Kind -> rows and columns of its projection in units of r, besides H columns."""


class Table(MegatronModule):
    """A weight [rows, r] of this rank, cut over TP by vocabulary. Calling the module returns it: an
    overlapped parameter gather waits in the call for the bucket that holds the weight."""

    def __init__(self, config: Any, rows: int, rank: int, tp_group: Any) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.weight = empty_parameter(config, rows, rank)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]
        sharded = tp_group.size() > 1
        set_tensor_model_parallel_attributes(self.weight, sharded, 0, 1)
        with get_cuda_rng_tracker().fork() if sharded else nullcontext():
            config.init_method(self.weight)

    def forward(self) -> Tensor:
        return self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return the weight, whose padding depends on the layout."""
        tensors, axes = {"weight": self.weight}, {"weight": 0}
        sharded = sharded_tensors(tensors, axes, self.tp_group, prefix, sharded_offsets, metadata)
        sharded[f"{prefix}weight"].allow_shape_mismatch = True
        return sharded


class Projection(MegatronModule):
    """A linear layer [rows, columns] with a bias, the same on every TP rank."""

    def __init__(self, config: Any, rows: int, columns: int) -> None:
        super().__init__(config=config)
        self.weight, self.bias = (
            empty_parameter(config, rows, columns),
            empty_parameter(config, rows),
        )
        config.init_method(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, *parts: Tensor) -> Tensor:
        """Project the parts [..., columns], put side by side, to [..., rows]. No collective."""
        return linear(torch.cat(parts, dim=-1), self.weight) + self.bias


class MarkovHead(MegatronModule):
    """W1 [Vp, r], W2 [Dp, r] and the projection of a gated or recurrent head.

    W1 and W2 are cut over TP like the base's embedding and the draft's head.
    """

    def __init__(
        self, config: Any, kind: str, rank: int, base_rows: int, shard: VocabShard, tp_group: Any
    ) -> None:
        super().__init__(config=config)
        self.kind, self.rank, self.shard, self.tp_group = kind, rank, shard, tp_group
        self.w1 = Table(config, base_rows, rank, tp_group)
        self.w2 = Table(config, shard.padded_rows, rank, tp_group)
        self.projection: Projection | None = None
        if widths := WIDTHS[kind]:
            rows, columns = (width * rank for width in widths)
            self.projection = Projection(config, rows, columns + config.hidden_size)

    def output(self) -> Tensor:
        """Return this rank's rows of W2 [Dp, r], padding sliced off. No collective."""
        return self.w2()[: self.shard.rows]

    def embed(self, previous: Tensor, sequence_parallel: bool = False) -> Tensor:
        """Return W1's rows [n, r] of the tokens ``previous`` [n], of which each rank gets its part
        under ``sequence_parallel``. One all-reduce or reduce-scatter over TP; differentiable."""
        table = self.w1()
        local = previous - self.tp_group.rank() * table.shape[0]
        outside = (local < 0) | (local >= table.shape[0])
        rows = torch.nn.functional.embedding(local.masked_fill(outside, 0), table)
        rows = rows.masked_fill(outside.unsqueeze(-1), 0.0)
        if sequence_parallel and self.tp_group.size() > 1:
            return reduce_scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Return what W2 multiplies, [N, B, r], from hidden [N, B, H] and W1's rows [N, B, r]. No
        collective."""
        state = embedded.new_zeros(embedded.shape[0], self.rank)
        if self.kind != "rnn":
            return self.step(hidden, embedded, state)[0]
        outputs = []
        for slot in range(hidden.shape[1]):
            output, state = self.step(hidden[:, slot], embedded[:, slot], state)
            outputs.append(output)
        return torch.stack(outputs, dim=1)

    def step(self, hidden: Tensor, embedded: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return what W2 multiplies and the next state, from hidden [..., H], W1's rows [..., r]
        and the state [..., r], which a recurrent head alone reads. No collective."""
        if self.projection is None:
            return embedded, state
        if self.kind == "gated":
            return torch.sigmoid(self.projection(hidden, embedded)) * embedded, state
        update, candidate, output = self.projection(state, embedded, hidden).chunk(3, dim=-1)
        update = torch.sigmoid(update)
        state = update * state + (1 - update) * torch.tanh(candidate)
        return torch.tanh(output), state
