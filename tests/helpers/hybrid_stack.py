"""Megatron's HybridModel on a CPU: the stack of its trainer, with the names it has beside
Transformer Engine, whose modules are stood in for by a norm and a linear layer in one.

Nothing of it is the package's.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.ssm.gated_delta_net import common
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.torch_norm import WrappedTorchNorm


class NormedLinear(ColumnParallelLinear):
    """A column-parallel linear layer behind an RMSNorm, with Transformer Engine's names."""

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.eps = kwargs["config"].layernorm_epsilon

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return super().forward(x * scale * self.layer_norm_weight, *args, **kwargs)


def unit_length(x: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()


def hybrid_stack(experts: int | None) -> Any:
    """The specification of RMSNorm layers; ``common`` and the final norm are made to run here."""
    hybrid_block.TENorm = WrappedTorchNorm  # type: ignore[misc]
    common.HAVE_FLA, common.l2norm = True, unit_length
    layers = hybrid_stack_spec.submodules  # changed in place: this process trains one model
    attention = layers.attention_layer.submodules.self_attention.submodules
    attention.linear_qkv, attention.linear_proj = NormedLinear, RowParallelLinear
    attention.core_attention = DotProductAttention
    latent = layers.mla_layer.submodules
    latent.self_attention = get_gpt_layer_local_spec(
        multi_latent_attention=True, normalization="RMSNorm"
    ).submodules.self_attention
    latent.input_layernorm = WrappedTorchNorm
    delta_net = layers.gdn_layer.submodules.self_attention.submodules
    delta_net.in_proj, delta_net.out_proj = NormedLinear, RowParallelLinear
    delta_net.out_norm = WrappedTorchNorm
    mlp = layers.mlp_layer.submodules.mlp.keywords["submodules"]
    mlp.linear_fc1, mlp.linear_fc2 = NormedLinear, RowParallelLinear
    local = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm")
    layers.moe_layer.submodules.mlp = local.submodules.mlp
    layers.moe_layer.submodules.pre_mlp_layernorm = WrappedTorchNorm
    return hybrid_stack_spec
