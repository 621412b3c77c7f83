"""The head of a draft: a vocab-parallel one of its own, or the base's output layer.

H hidden, Dp and Vp this rank's shards of the draft's and the base's vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.compat import ColumnParallelLinear, MegatronModule
from megatron_eagle.loss.head_gradient import RowsAddedElsewhere
from megatron_eagle.parallel.vocab import VocabShard


class VocabParallelHead(ColumnParallelLinear):
    """``lm_head``. Calling it returns its rows, not logits: the loss multiplies by them.

    It has to be called, never read: an overlapped parameter gather waits in a module's forward
    pre-hook for the bucket that holds its weight.
    """

    def __init__(self, config: Any, shard: VocabShard, tp_group: Any) -> None:
        config = copy.copy(config)
        # Megatron asks for Apex's kernel, which the loss does not use.
        config.gradient_accumulation_fusion = False
        super().__init__(
            config.hidden_size,
            shard.padded_rows * shard.world,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=tp_group,
        )
        self.rows = shard.rows
        # As Megatron marks its own head: --decoupled-lr and Muon treat it apart.
        self.weight.is_embedding_or_output_parameter = True

    def gradient_rows(self) -> Tensor | None:
        """Return where Megatron's DistributedDataParallel sums the gradient of this rank's rows,
        [Dp, H]; None without one, or with one that would round."""
        total = getattr(self.weight, "main_grad", None)
        if total is None or total.dtype != torch.float32:
            return None
        return total[: self.rows]

    def forward(self, added_elsewhere: bool = False) -> Tensor:
        """Return this rank's rows [Dp, H], padding sliced off. No collective.

        With ``added_elsewhere`` the caller adds their gradient to :meth:`gradient_rows`; the one
        that autograd brings is ignored.
        """
        if added_elsewhere:
            return RowsAddedElsewhere.apply(self.weight, self.rows)
        whole = self.rows == self.weight.shape[0]  # a slice's backward would copy the gradient
        return self.weight if whole else self.weight[: self.rows]


class SharedHead(MegatronModule):
    """EAGLE-1's head: the base's frozen output layer, without a parameter of its own."""

    def __init__(self, config: Any, base_head: Callable[[], Tensor], shard: VocabShard) -> None:
        super().__init__(config=config)
        self.base_head, self.rows = base_head, shard.rows

    def gradient_rows(self) -> Tensor | None:
        """Return None: there is no gradient."""
        return None

    def forward(self, added_elsewhere: bool = False) -> Tensor:
        """Return this rank's rows [Vp, H], padding sliced off; no gradient."""
        return self.base_head().detach()[: self.rows]
