"""The families of bases: the name tables of each, and what its config.json means.

A new family is one ``Family`` here and, where its config.json has new fields, a few lines in
``megatron_args``. ``megatron_eagle.hf.tables.entries`` explains the tables' rows and the symbols of
their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_eagle.checkpoint.hybrid_pattern import ATTENTION as ATTENTION_LAYER
from megatron_eagle.errors import UserError
from megatron_eagle.hf.base import hybrid_args, moe_args
from megatron_eagle.hf.base.delta_net_tables import (
    DELTA_NET,
    GATED_ATTENTION,
    GATED_MOE,
    SPLIT_DELTA_NET,
)
from megatron_eagle.hf.base.dense_tables import ATTENTION, DENSE, HYBRID_MODEL, MODEL
from megatron_eagle.hf.base.mla_tables import MLA_ATTENTION
from megatron_eagle.hf.base.module_names import (
    DEEPSEEK,
    GLM,
    MIMO,
    QWEN3_5,
    QWEN3_NEXT,
    ModuleNames,
)
from megatron_eagle.hf.base.moe_tables import BIASED_MOE, DEEPSEEK_MOE, GPT_OSS_MOE, moe
from megatron_eagle.hf.base.window_args import (
    WindowLayers,
    every_layer,
    every_other_layer,
    upper_layers,
)
from megatron_eagle.hf.tables.entries import Entry, Table, entries_of


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture: its name tables, and what its config.json means.

    ``attention``: table of the attention of every layer; ``dense`` and ``moe``: tables of the two
    kinds of MLP; ``model``: table of the tensors outside the layers. ``ignored_in_layer``: tensors
    that a layer may have and that are not imported. ``defaults``: defaults of the configuration
    class, where this package's readers assume other ones. ``fixed``: settings of the class that no
    field of config.json changes. ``layer_args``: Megatron arguments that its layers always have.
    ``moe_args``: reader of the experts' fields. ``mixers``: reader of what mixes the positions in
    each layer, of a family whose layers differ in it; ``delta_net``: table of those that have a
    gated delta net instead of attention. ``mla``: whether attention is multi-latent.
    ``partial_rotary``: whether the class reads ``partial_rotary_factor``. ``window_switch``: the
    field that turns sliding windows on; ``window_layers``: which layers then have one.
    ``module``: the names of its own next-token module, of a family that may have one.
    """

    name: str
    architecture: str
    attention: Table = field(default_factory=lambda: ATTENTION)
    dense: Table = field(default_factory=lambda: DENSE)
    moe: Table = field(default_factory=dict)
    model: Table = field(default_factory=lambda: MODEL)
    ignored_in_layer: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    layer_args: Mapping[str, Any] = field(default_factory=lambda: {"swiglu": True})
    moe_args: Callable[[Mapping[str, Any], str], dict[str, Any]] | None = None
    mixers: Callable[[Mapping[str, Any], str], list[str]] | None = None
    delta_net: Table = field(default_factory=dict)
    mla: bool = False
    partial_rotary: bool = False
    window_switch: str = "use_sliding_window"
    window_layers: WindowLayers = every_layer
    module: ModuleNames | None = None

    def in_layer(
        self, facts: Mapping[str, Any], moe: bool, mixer: str = ATTENTION_LAYER
    ) -> list[Entry]:
        """Return the entries of one layer, whose MLP is a MoE or not, and whose positions are mixed
        by ``mixer`` (a symbol of ``checkpoint/hybrid_pattern.py``)."""
        mixing = self.attention if mixer == ATTENTION_LAYER else self.delta_net
        table = {**mixing, **(self.moe if moe else self.dense)}
        return [entry for entry in entries_of(table) if entry.exists(facts)]

    def outside_layers(self, facts: Mapping[str, Any]) -> list[Entry]:
        """Return the entries outside the layers: embedding, final norm, output layer."""
        return [entry for entry in entries_of(self.model) if entry.exists(facts)]

    def absent(self, facts: Mapping[str, Any]) -> list[Entry]:
        """Return the entries outside the layers that a model of these facts does not have."""
        return [entry for entry in entries_of(self.model) if not entry.exists(facts)]


NO_BIAS = {"attention_bias": False, "mlp_bias": False, "qkv_bias": False}
FAMILIES = {
    family.architecture: family
    for family in (
        Family("llama", "LlamaForCausalLM"),
        Family(
            "mistral",
            "MistralForCausalLM",
            fixed=NO_BIAS,
            defaults={"num_key_value_heads": 8, "sliding_window": 4096},
            window_switch="sliding_window",
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            fixed=NO_BIAS | {"qkv_bias": True},
            defaults={"num_key_value_heads": 32, "sliding_window": 4096},
            window_layers=upper_layers,
        ),
        Family(
            "mimo",
            "MiMoForCausalLM",
            fixed={"mlp_bias": False, "output_bias": False, "qkv_bias": True},
            defaults={"num_key_value_heads": 32, "sliding_window": 4096},
            window_layers=upper_layers,
            module=MIMO,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            fixed={"mlp_bias": False, "qk_norm": True},
            defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
            window_layers=upper_layers,
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            moe=moe("block_sparse_moe", "gate", "w1", "w3", "w2"),
            moe_args=moe_args.softmax_after_topk,
            fixed=NO_BIAS,
            defaults={
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
            window_switch="sliding_window",
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            moe=moe("mlp", "gate", "gate_proj", "up_proj", "down_proj"),
            moe_args=moe_args.qwen3_moe,
            fixed={"mlp_bias": False, "qk_norm": True},
            defaults={
                "num_key_value_heads": 4,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": False,
                "sliding_window": 4096,
            },
        ),
        Family(
            "qwen3_next",
            "Qwen3NextForCausalLM",
            model=HYBRID_MODEL,
            attention=GATED_ATTENTION,
            delta_net=DELTA_NET,
            mixers=hybrid_args.qwen3_next,
            moe=GATED_MOE,
            moe_args=moe_args.qwen3_next,
            layer_args=hybrid_args.QWEN3_NEXT_LAYERS,
            fixed=NO_BIAS | {"qk_norm": True},
            partial_rotary=True,
            defaults=hybrid_args.QWEN3_NEXT_DEFAULTS,
            module=QWEN3_NEXT,
        ),
        Family(
            "qwen3_5",
            "Qwen3_5ForCausalLM",
            model=HYBRID_MODEL,
            attention=GATED_ATTENTION,
            delta_net=SPLIT_DELTA_NET,
            mixers=hybrid_args.qwen3_5,
            layer_args=hybrid_args.QWEN3_NEXT_LAYERS,
            fixed=NO_BIAS | {"qk_norm": True},
            partial_rotary=True,
            defaults=hybrid_args.QWEN3_5_DEFAULTS,
            module=QWEN3_5,
        ),
        Family(
            "gpt_oss",
            "GptOssForCausalLM",
            attention={
                **ATTENTION,
                "self_attention.core_attention.softmax_offset": ("self_attn.sinks", "N"),
            },
            moe=GPT_OSS_MOE,
            moe_args=moe_args.gpt_oss,
            fixed={"mlp_bias": True},
            layer_args={
                "swiglu": False,
                "quick_geglu": True,
                "glu_linear_offset": 1.0,
                "activation_func_clamp_value": 7.0,
                "softmax_type": "learnable",
            },
            defaults={
                "num_key_value_heads": 8,
                "head_dim": 64,
                "rms_norm_eps": 1e-5,
                "rope_theta": 150000.0,
                "attention_bias": True,
                "num_experts_per_tok": 4,
                "sliding_window": 128,
            },
            window_switch="sliding_window",
            window_layers=every_other_layer,
        ),
        Family(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            moe=BIASED_MOE,
            moe_args=moe_args.deepseek_v3,
            module=GLM,
            fixed={"mlp_bias": False, "output_bias": False},
            partial_rotary=True,
            defaults={
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "partial_rotary_factor": 0.5,
                "moe_intermediate_size": 1408,
                "num_experts_per_tok": 8,
                "n_routed_experts": 128,
                "n_shared_experts": 1,
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 1,
            },
        ),
        Family(
            "deepseek_v2",
            "DeepseekV2ForCausalLM",
            attention=MLA_ATTENTION,
            moe=DEEPSEEK_MOE,
            moe_args=moe_args.deepseek_v2,
            mla=True,
            fixed=NO_BIAS,
            defaults={"q_lora_rank": 1536, "n_routed_experts": 64, "n_shared_experts": 2},
        ),
        Family(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            attention=MLA_ATTENTION,
            moe=BIASED_MOE,
            moe_args=moe_args.deepseek_v3,
            module=DEEPSEEK,
            mla=True,
            fixed=NO_BIAS,
            defaults={
                "q_lora_rank": 1536,
                "n_routed_experts": 256,
                "n_shared_experts": 1,
                "n_group": 8,
                "topk_group": 4,
                "num_experts_per_tok": 8,
                "first_k_dense_replace": 3,
                "routed_scaling_factor": 2.5,
            },
        ),
    )
}


def family_of(config: dict[str, Any], source: str) -> Family:
    """Return the family of a config.json; raises UserError, naming ``source``, if unknown."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise UserError(f"{source}: architectures must name exactly one class, found {names!r}")
    family = FAMILIES.get(names[0]) if isinstance(names[0], str) else None
    if family is None:
        raise UserError(
            f"{source}: architecture {names[0]!r} is not supported; known: {', '.join(FAMILIES)}"
        )
    return family
