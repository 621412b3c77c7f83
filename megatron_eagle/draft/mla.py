"""Multi-latent attention of a draft's layers: Megatron's own, with down projections of ours.

Megatron builds down projections ``hidden_size`` wide, of linears it knows. A draft's first layer
reads twice that. And its local ones, sharded over TP, lose a part of their gradient: the rotary key
is one for all heads, and no rank hears of the other ranks' heads. Here they are whole on every
rank, as Transformer Engine's are, and that gradient is summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.mla import MLARotary
from megatron_eagle.checkpoint.sharded_tensors import sharded_tensors
from megatron_eagle.compat import (
    MegatronModule,
    MLASelfAttention,
    MultiLatentAttention,
    build_module,
    copy_to_tensor_model_parallel_region,
)
from megatron_eagle.draft.features import empty_parameter
from megatron_eagle.layers.base_spec import MLA_NORMS
from megatron_eagle.platform.cpu.products import linear


class DownProjection(MegatronModule):
    """[S', B, N] -> [S', B, M], no bias, the weight on every rank. With ``shared`` the last so many
    channels are read by every head: without sequence parallelism, which gathers them later, their
    gradient is summed over TP (one all-reduce in backward)."""

    def __init__(self, config: Any, sizes: tuple[int, int], shared: int, tp_group: Any) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.shared = 0 if config.sequence_parallel else shared
        inputs, outputs = sizes
        self.weight = empty_parameter(config, outputs, inputs)
        config.init_method(self.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        projected = linear(x, self.weight)
        if self.shared and self.tp_group.size() > 1:
            own, shared = projected.split([projected.shape[-1] - self.shared, self.shared], dim=-1)
            shared = copy_to_tensor_model_parallel_region(shared, group=self.tp_group)
            projected = torch.cat([own, shared], dim=-1)
        return projected, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        weight = {"weight": self.weight}
        return sharded_tensors(weight, {}, self.tp_group, prefix, sharded_offsets, metadata)


class DraftMLASelfAttention(MLASelfAttention):
    """Megatron's MLA over inputs of ``input_size``, with modules and names as MLASelfAttention has
    them. Its angles are those that :func:`share_rotary` lets all layers ask for."""

    def __init__(
        self,
        config: Any,
        submodules: Any,
        layer_number: int,
        attn_mask_type: Any,
        input_size: int,
        norm: Callable[..., torch.nn.Module],
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None:
        # MLASelfAttention's own would build what is built here.
        MultiLatentAttention.__init__(
            self, config, submodules, layer_number, attn_mask_type, "self", cp_comm_type,
            pg_collection, pp_layer_offset, name,
        )  # fmt: skip
        heads, eps = config.num_attention_heads, config.layernorm_epsilon
        column_parallel = {
            "config": config,
            "init_method": config.init_method,
            "gather_output": False,
            "bias": False,
            "skip_bias_add": False,
            "is_expert": False,
            "tp_group": pg_collection.tp,
        }

        def up(builder: Any, name: str, inputs: int, head_size: int) -> Any:
            sizes = (inputs, heads * head_size)
            return build_module(builder, *sizes, tp_comm_buffer_name=name, **column_parallel)

        def down(outputs: int, shared: int = 0) -> DownProjection:
            return DownProjection(config, (input_size, outputs), shared, pg_collection.tp)

        rank, rotary = config.kv_lora_rank, config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = down(rank + rotary, shared=rotary)
        self.kv_layernorm = norm(config=config, hidden_size=rank, eps=eps)
        self.linear_kv_up_proj = up(
            submodules.linear_kv_up_proj, "kv_up_proj", rank, config.qk_head_dim + config.v_head_dim
        )
        rank = config.q_lora_rank
        if rank is None:
            self.linear_q_proj = up(submodules.linear_q_proj, "q_proj", input_size, self.q_head_dim)
        else:
            self.linear_q_down_proj = down(rank)
            self.q_layernorm = norm(config=config, hidden_size=rank, eps=eps)
            self.linear_q_up_proj = up(
                submodules.linear_q_up_proj, "q_up_proj", rank, self.q_head_dim
            )


def use_mla(layer_spec: Any, input_size: int, norm: Callable[..., Any]) -> None:
    """Make an MLA TransformerLayer spec use :class:`DraftMLASelfAttention`, in place."""
    layer = layer_spec.submodules
    layer.self_attention.module = DraftMLASelfAttention
    layer.self_attention.params |= {"input_size": input_size, "norm": norm}
    layer.sharded_state_dict_keys_map = {**layer.sharded_state_dict_keys_map, **MLA_NORMS}


def share_rotary(layers: Iterable[Any], factor: float) -> MLARotary:
    """Give all MLA layers one rotary module, whose angles the caller says before every pass;
    ``factor`` multiplies cos and sin."""
    attentions = [layer.self_attention for layer in layers]
    shared = MLARotary(attentions[0].rotary_pos_emb, factor)
    for attention in attentions:
        attention.rotary_pos_emb = shared
    return shared
