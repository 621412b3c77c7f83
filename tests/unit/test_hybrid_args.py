"""Qwen3-Next's config.json as a Megatron HybridModel, and the configurations that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_eagle.checkpoint.hybrid_pattern import mixers
from megatron_eagle.config import DraftSpec
from megatron_eagle.errors import UserError
from megatron_eagle.hf.base.delta_net_tables import join_gated_groups, split_gated_groups
from megatron_eagle.hf.base.families import FAMILIES
from megatron_eagle.hf.base.megatron_args import dims_of, facts_of, megatron_args
from megatron_eagle.hf.base.moe_args import moe_layers
from megatron_eagle.hf.draft.base_module import beside_base
from megatron_eagle.hf.tables.entries import entries_of
from tests.helpers.tiny_hf import FIELDS, SIZES

FAMILY = FAMILIES["Qwen3NextForCausalLM"]
CONFIG: dict[str, Any] = {**SIZES, **FIELDS["qwen3_next"]}


def args_of(**fields: Any) -> dict[str, Any]:
    return megatron_args({**CONFIG, **fields}, FAMILY, "config.json")


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({}, "GE*-GE*E"),
        ({"full_attention_interval": None, "mlp_only_layers": None}, "GEGEGE*E"),
        ({"layer_types": ["full_attention", *["linear_attention"] * 3]}, "*EG-GEGE"),
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, "G-*EG-*E"),
    ],
)
def test_a_layer_is_two_symbols(fields: dict[str, Any], pattern: str) -> None:
    args = args_of(**fields)
    assert args["hybrid_layer_pattern"] == pattern and args["num_layers"] == 4
    assert "".join(mixers(args)) == pattern[::2]
    assert ["-E"[moe] for moe in moe_layers(args)] == list(pattern[1::2])


def test_what_config_json_leaves_out_is_the_class_s_default() -> None:
    from transformers import Qwen3NextConfig

    args = megatron_args(dict(SIZES), FAMILY, "config.json")
    config = Qwen3NextConfig(**SIZES)
    names = {
        "num_experts": "num_experts", "moe_router_topk": "num_experts_per_tok",
        "moe_ffn_hidden_size": "moe_intermediate_size", "kv_channels": "head_dim",
        "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
        **{name: name for name in args if name.startswith("linear_")},
    }  # fmt: skip
    assert {name: args[name] for name in names} == {n: getattr(config, h) for n, h in names.items()}
    assert args["rotary_percent"] == config.rope_parameters["partial_rotary_factor"]
    assert args["moe_router_pre_softmax"] is not config.norm_topk_prob


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types must name a kind for each of 4 layers"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types 'sliding_attention' is not supp"),
        ({"layer_types": [[]] * 4}, r"layer_types \[\] is not supported"),
        ({"full_attention_interval": 0}, "full_attention_interval must be a positive integer"),
        ({"linear_num_value_heads": 6}, "linear_num_value_heads 6 is not a multiple of linear_num"),
        ({"linear_key_head_dim": "x"}, "linear_key_head_dim must be a positive integer, found 'x'"),
        ({"attention_bias": True}, "attention_bias = True is not supported, only False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type 'sigmoid' is not supported, only 's"),
        ({"num_experts": 0}, "num_experts must be a positive integer, found 0"),
        ({"num_experts_per_tok": 1}, "a renormalised top-1 router is not supported"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size must be a posit"),
        (
            {"rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            }},
            "rope of type llama3 is not supported beside gated delta nets",
        ),
    ],
)  # fmt: skip
def test_what_megatron_would_not_compute_is_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"config.json: {message}") as error:
        args_of(**fields)
    assert "\n" not in str(error.value)


def test_a_module_s_layer_is_known_where_all_layers_are_alike() -> None:
    spec = DraftSpec(algorithm="mtp")
    with pytest.raises(UserError, match=r"algorithm mtp: some .* \(GE\*-GE\*E\), and no field"):
        beside_base(spec, args_of())
    assert beside_base(spec, args_of(mlp_only_layers=[])).num_experts == 4


def test_rows_lie_as_the_model_splits_them() -> None:
    """transformers' own splitting of one vector equals Megatron's parts of the matrices."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    facts = facts_of(CONFIG, FAMILY, "config.json")
    dims = dims_of(facts)
    net = Qwen3NextGatedDeltaNet(Qwen3NextConfig(**CONFIG), 0)
    parts = {entry.megatron.rpartition(".")[2]: entry for entry in entries_of(FAMILY.delta_net)
             if "in_proj.weight" in entry.megatron}  # fmt: skip
    x = torch.randn(1, 1, dims["H"])
    expected = net.fix_query_key_value_ordering(net.in_proj_qkvz(x), net.in_proj_ba(x))
    for name, values in zip(("query", "key", "value", "z", "beta", "alpha"), expected, strict=True):
        entry = parts[name]
        source = {"beta": net.in_proj_ba, "alpha": net.in_proj_ba}.get(name, net.in_proj_qkvz)
        weight = entry.join([source.weight], dims)
        assert weight.shape == entry.sizes(dims)
        torch.testing.assert_close(x @ weight.t(), values.flatten(2))


def test_gated_queries_come_back() -> None:
    dims = dims_of(args_of())
    (entry,) = (e for e in entries_of(FAMILY.attention) if e.megatron.endswith("qkv.weight"))
    parts = [torch.randn(source.sizes(dims)) for source in entry.sources]
    whole = join_gated_groups(parts, dims)
    assert whole.shape == entry.sizes(dims)
    # Head 3 is the second query of group 1: its gate lies behind both queries of the group.
    size, rows = dims["HD"], whole.unflatten(0, (dims["groups"], -1, dims["HD"]))
    assert rows[1, 1].equal(parts[0][6 * size : 7 * size])
    assert rows[1, 3].equal(parts[0][7 * size : 8 * size])
    for back, part in zip(split_gated_groups(whole, entry.sources, dims), parts, strict=True):
        assert back.equal(part)


def test_decay_in_half_precision_is_that_of_transformers() -> None:
    from megatron_eagle.layers.recurrent import delta_net

    torch.manual_seed(0)
    a_log, dt_bias, alpha, beta = (torch.randn(8).bfloat16() for _ in range(4))
    expected = -a_log.float().exp() * torch.nn.functional.softplus(alpha.float() + dt_bias)
    decays = []
    for native in (False, True):
        net = object.__new__(delta_net(native))
        torch.nn.Module.__init__(net)
        decays.append(net._compute_g_and_beta(a_log, dt_bias, alpha, beta)[0])
    assert decays[0].equal(expected) and not decays[1].equal(expected)
