"""Define the core attention of base and draft, as a Megatron-Core ``core_attention`` builder.

Every Megatron attention (GQA, MLA) hands its ``attention_mask`` argument untouched to its core
attention. Here that argument is not a tensor but what a mask would have described: ``None`` for
plain causal attention, or an ``AttentionState`` that remembers keys and values (the trunk and
branch of a TTT unroll, a decoding cache).

Shape letters: B sequences, n query heads and g key/value heads of this TP rank (g divides n), S
positions of this CP rank, d channels of a key, dv of a value.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.attention import flash, one_launch, varlen
from megatron_eagle.attention.blocks import (
    CAUSAL,
    Plan,
    beside_sink,
    block_attention,
    sink_attention,
    span_plan,
)
from megatron_eagle.attention.live_rows import LiveRows
from megatron_eagle.attention.packing import Packing
from megatron_eagle.attention.trunk_branch import trunk_branch_attention
from megatron_eagle.attention.varlen import Segments
from megatron_eagle.checkpoint.sharded_tensors import sharded_tensors
from megatron_eagle.compat import MegatronModule, is_layer_window_attention
from megatron_eagle.parallel.context import ContextShard, gather_key_value


class AttentionState(Protocol):
    """Attention by remembered keys and values, kept per layer."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Attend to the keys of earlier calls of ``layer`` and to these; return [B, n, S, dv].

        Args:
            layer: Megatron's layer number.
            query, key, value: [B, n, S, d], [B, g, S, d], [B, g, S, dv].
            scale: factor of the scores.
            window: a position sees itself and the ``window`` - 1 keys before it.
            sink: [n], a score per head that joins the softmax and has no value.
        """
        ...


class TrunkBranchState:
    """Keys and values of one TTT unroll: the trunk of step 0 and the branches of later steps.

    The first call of a layer sets its trunk, every later call adds one branch key per position. Use
    one instance per micro-batch. Under context parallelism the trunk is gathered over ``group``:
    one all-gather per layer, however many steps attend to it (backward: one reduce-scatter). Branch
    keys are used at their own position only and are not sent. Where sequences are packed, a query
    sees the trunk of its own document.

    Queries of all rows come at step 0. Layer ``last_layer`` answers those of the ``live`` rows
    alone, [1, n, N, dv] (and may be asked no others), and every later call brings nothing but live
    rows, [1, n, N, d]. Where all rows are live, every call brings and answers [B, n, S, d].
    """

    def __init__(
        self,
        group: ProcessGroup,
        live: LiveRows,
        last_layer: int,
        packing: Packing | None = None,
    ) -> None:
        self._group, self._live, self._last_layer = group, live, last_layer
        self._packing = packing
        self._live_plan = None if live.whole else live.plan(packing)
        self._keys: dict[int, list[Tensor]] = {}
        self._values: dict[int, list[Tensor]] = {}
        self._segments: dict[bool, Segments] = {}
        self._plan_of_all: Plan | None = None

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """See ``AttentionState``; differentiable in query, key and value."""
        assert window is None and sink is None, "drafts have neither"
        keys = self._keys.setdefault(layer, [])
        values = self._values.setdefault(layer, [])
        plan = self._live_plan
        if not keys:
            key, value = gather_key_value(key, value, self._group)
            if layer != self._last_layer:
                plan = None
            elif query.shape[0] * query.shape[2] == self._live.total:
                query = self._live.take(query.permute(2, 0, 1, 3)).permute(1, 2, 0, 3)
        keys.append(key)
        values.append(value.contiguous())  # a view would keep the whole of q, k and v
        length = keys[0].shape[2]
        trunk = self._in_one_launch(plan or self._full_plan(length), query, length)
        return trunk_branch_attention(query, keys[0], values[0], keys[1:], values[1:], scale, trunk)

    def _in_one_launch(self, plan: Plan, query: Tensor, length: int) -> Plan | Segments:
        """Return ``plan`` as segments of ``length`` keys, where a CUDA kernel takes all at once."""
        if len(plan) == 1 or self._group.size() > 1 or not varlen.applies(query):
            return plan
        narrow = plan is self._live_plan
        if narrow not in self._segments:
            runs = self._live.runs
            whole = tuple(((0, length),) for _ in runs)
            documents = whole if self._packing is None else self._packing.documents
            self._segments[narrow] = Segments.of(runs if narrow else whole, documents, query.device)
        return self._segments[narrow]

    def _full_plan(self, length: int) -> Plan:
        """Return the plan of all of this rank's queries against ``length`` keys."""
        if self._plan_of_all is None:
            packing = self._packing
            self._plan_of_all = (
                context_plan(length, self._group) if packing is None else packing.plan(self._group)
            )
        return self._plan_of_all


def context_plan(length: int, group: ProcessGroup, window: int | None = None) -> Plan:
    """Return the causal plan of this CP rank's queries against all ``length`` keys in order."""
    if group.size() == 1 and window is None:
        return CAUSAL
    return span_plan(ContextShard.of(length, group).spans, window=window)


class EagleCoreAttention(MegatronModule):
    """Causal or stateful attention over this TP rank's heads. No dropout, no mask tensor.

    query [S, B, n, d], key [S, B, g, d], value [S, B, g, dv] -> [S, B, n * dv]. Under context
    parallelism S is this rank's part in Megatron's zigzag order, keys and values are gathered (one
    all-gather), and backward sums their gradients (one reduce-scatter); no collective otherwise.
    The constructor's arguments are Megatron's.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.cp_group, self.tp_group = pg_collection.cp, pg_collection.tp
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        # Megatron's size does not count a position's own key.
        self.window = config.window_size[0] + 1 if windowed else None
        self.softmax_offset: Tensor | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // self.tp_group.size()
            device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
            self.softmax_offset = torch.nn.Parameter(
                torch.zeros(heads, dtype=config.params_dtype, device=device)
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: AttentionState | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend causally, or by the state that comes as ``attention_mask``; shapes above."""
        assert attention_bias is None and packed_seq_params is None
        scale = self.softmax_scale or query.shape[-1] ** -0.5
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        sink = self.softmax_offset
        if attention_mask is not None:
            out = attention_mask.attend(self.layer_number, q, k, v, scale, self.window, sink)
        elif self._takes_one_launch(q):
            out, lse = one_launch.forward(q, k, v, scale, window=self.window)
            out = out if sink is None else beside_sink(out, lse, sink)
        elif self.window is not None or sink is not None or self.cp_group.size() > 1:
            k, v = gather_key_value(k, v, self.cp_group)
            plan = context_plan(k.shape[2], self.cp_group, self.window)
            if sink is not None:
                out = sink_attention(q, k, v, scale, plan, sink)
            else:
                out = block_attention(q, k, v, scale, plan)
        else:
            # PyTorch's fused kernels want values as wide as keys.
            out = torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                flash.widened(v, q),
                is_causal=True,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )[..., : v.shape[-1]]
        return out.permute(2, 0, 1, 3).flatten(2).contiguous()

    def _takes_one_launch(self, q: Tensor) -> bool:
        """Return whether a window or a sink of a frozen base is an argument of a CUDA kernel."""
        special = self.window is not None or self.softmax_offset is not None
        return special and self.cp_group.size() == 1 and one_launch.applies(q)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return the sinks, if there are any, as a tensor cut over TP."""
        tensors, axes = self.state_dict(prefix="", keep_vars=True), {"softmax_offset": 0}
        return sharded_tensors(tensors, axes, self.tp_group, prefix, sharded_offsets, metadata)


def with_eagle_attention(layer_spec: Any) -> Any:
    """Return ``layer_spec``, a TransformerLayer ``ModuleSpec``, with ``EagleCoreAttention``.

    It is changed in place; parameters and checkpoint keys stay the same.
    """
    layer_spec.submodules.self_attention.submodules.core_attention = EagleCoreAttention
    return layer_spec
