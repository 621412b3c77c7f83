"""Let an attention layer make queries of the live rows alone, beside all rows' keys and values.

Megatron makes all three by one product with ``linear_qkv``, whose weight holds, group by group, the
query heads, a key and a value. Where others read only keys and values of a row, two products with
the two parts of that weight do; copying it costs a hundredth of what the left out queries do.

Shape letters: S' this rank's tokens, B micro-batch, R rows of all tensor-parallel ranks together
(S * B), C input channels, N rows that have queries, n and g query and key heads of this rank, d
channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.attention.live_rows import take_rows
from megatron_eagle.compat import SelfAttention, copy_to_tensor_model_parallel_region
from megatron_eagle.loss.head_gradient import no_gradient
from megatron_eagle.parallel.collectives import all_gather
from megatron_eagle.parallel.products import product, product_fp32


class LiveQueryAttention(SelfAttention):
    """Megatron's grouped-query attention; inside ``Narrowing.to`` some rows have no query."""

    query_rows: Tensor | None = None
    """[N] int64: the rows of all R that have queries; None: all have."""
    answered_rows: Tensor | None = None
    """[N] int64: the rows that are answered, where all have queries; None: all are."""

    @property
    def splits_products(self) -> bool:
        """Whether queries can be made apart: no norm or rotary embedding is fused into the product,
        which has no bias, and no group of heads is cut over ranks."""
        config: Any = self.config
        return (
            isinstance(self.linear_qkv, _LiveQueryLinear)
            and not config.fused_single_qkv_rope
            and not (config.add_qkv_bias or config.add_bias_linear)
            and config.num_query_groups >= self.pg_collection.tp.size()
        )

    @property
    def key_value_weights(self) -> int:
        """How many elements of ``linear_qkv`` make this rank's keys and values."""
        columns: int = self.linear_qkv.weight.shape[1]
        return (
            2 * self.num_query_groups_per_partition * self.hidden_size_per_attention_head * columns
        )

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return query [N, 1, n, d], or as Megatron does [S, B, n, d], and key and value [S, B, g,
        d]; with an output gate that too, [N, 1, n, d] of the rows that are answered. Collectives:
        those of ``linear_qkv``."""
        if self.query_rows is None:
            made = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
            if self.answered_rows is None or not self.config.attention_output_gate:
                return made
            return *made[:3], take_rows(made[3], self.answered_rows)
        size, groups = self.hidden_size_per_attention_head, self.num_query_groups_per_partition
        config: Any = self.config
        split = _Split(
            rows=self.query_rows,
            groups=groups,
            size=size,
            tp_group=self.pg_collection.tp,
            sequence_parallel=config.sequence_parallel,
            adds_to_main_grad=config.gradient_accumulation_fusion,
        )
        queries, both = self.linear_qkv(hidden_states, split=split)
        batch = hidden_states.shape[1]
        gates: list[Tensor] = []
        if config.attention_output_gate:
            both_heads = queries.view(queries.shape[0], groups, 2, -1)
            queries, gate = (part.flatten(1) for part in both_heads.unbind(2))
            gates = [gate.reshape(-1, 1, gate.shape[-1] // size, size)]
        query = queries.reshape(-1, 1, queries.shape[-1] // size, size)
        key, value = both.view(-1, batch, groups, 2 * size).split(size, dim=-1)
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, value, *gates


class _LiveQueryLinear:
    """Mix-in of a column-parallel ``linear_qkv``. Its products are made inside its forward, so that
    Megatron's hooks have brought the weight."""

    weight: Tensor

    def forward(self, x: Tensor, *args: Any, split: _Split | None = None, **kwargs: Any) -> Any:
        """Run as ever, or return queries [N, n * d] and keys and values [R, g * 2d] of
        x [S', B, C]."""
        if split is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if not split.sequence_parallel:
            x = copy_to_tensor_model_parallel_region(x, group=split.tp_group)
        return _SplitProduct.apply(x.flatten(0, 1), self.weight, split)


@cache
def with_live_queries(linear: type) -> type:
    """Return ``linear``, a column-parallel linear's class, with products that can be split."""
    return type(f"LiveQuery{linear.__name__}", (_LiveQueryLinear, linear), {})


@dataclass(frozen=True)
class _Split:
    """How one product becomes two. ``rows`` as ``query_rows``; ``adds_to_main_grad``: as Megatron's
    and Transformer Engine's linears do with gradient accumulation fusion."""

    rows: Tensor
    groups: int
    size: int
    tp_group: ProcessGroup
    sequence_parallel: bool
    adds_to_main_grad: bool

    def gathered(self, x: Tensor) -> Tensor:
        """Return the rows [R, C] of all ranks; one all-gather under sequence parallelism."""
        return all_gather(x, self.tp_group).flatten(0, 1) if self.sequence_parallel else x

    def queries_of(self, weight: Tensor) -> Tensor:
        """Return the view of the weight [(n + 2g) * d, C], or of its gradient, that makes queries,
        and behind those of its group their gates, [g, n / g, d, C]."""
        return self._by_head(weight)[:, :-2]

    def keys_values_of(self, weight: Tensor) -> Tensor:
        """Return the view that makes keys and values, [g, 2, d, C]."""
        return self._by_head(weight)[:, -2:]

    def _by_head(self, weight: Tensor) -> Tensor:
        return weight.view(self.groups, -1, self.size, weight.shape[-1])


class _SplitProduct(torch.autograd.Function):
    """Queries [N, n * d] and keys and values [R, g * 2d] of x [S' * B, C]; keeps x alone.

    Collectives under sequence parallelism: one all-gather over TP, in backward one more and one
    reduce-scatter; otherwise none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, split: _Split) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.split = split
        whole = split.gathered(x)
        queries = product(whole[split.rows], split.queries_of(weight).flatten(0, 2))
        return queries, product(whole, split.keys_values_of(weight).flatten(0, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        split, (grad_query, grad_both) = ctx.split, grads
        grad = product(grad_both, split.keys_values_of(weight).flatten(0, 2).t())
        of_queries = product(grad_query, split.queries_of(weight).flatten(0, 2).t())
        grad.index_add_(0, split.rows, of_queries)
        pending = None
        if split.sequence_parallel:
            own = torch.empty_like(x)
            pending = torch.distributed.reduce_scatter_tensor(
                own, grad, group=split.tp_group, async_op=True
            )
            grad, summed = own, grad  # ``summed`` lives until it is sent
        whole = split.gathered(x)
        add = _add_to_main_grad if split.adds_to_main_grad else _new_gradient
        grad_weight = add(weight, split, (grad_query, whole[split.rows]), (grad_both, whole))
        if pending is not None:
            pending.wait()
            del summed
        return grad, grad_weight, None


_Factors = tuple[Tensor, Tensor]
"""(left, right) of a weight's gradient leftᵀ @ right."""


def _new_gradient(weight: Tensor, split: _Split, query: _Factors, both: _Factors) -> Tensor:
    """Return the weight's gradient."""
    grad = torch.empty_like(weight)
    for part, (left, right) in (
        (split.queries_of(grad), query),
        (split.keys_values_of(grad), both),
    ):
        part.copy_(product(left.t(), right.t()).view_as(part))
    return grad


def _add_to_main_grad(weight: Any, split: _Split, query: _Factors, both: _Factors) -> Tensor | None:
    """Add the weight's gradient to its ``main_grad``; return what Megatron's hook does not read."""
    total = weight.main_grad
    parts = ((split.queries_of(total), query), (split.keys_values_of(total), both))
    for part, (left, right) in parts:
        part.add_(product_fp32(left.t(), right.t()).view_as(part))
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return no_gradient(weight.detach())
