"""EagleConfig: flags, defaults and checks."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from megatron_eagle.config import EagleConfig
from megatron_eagle.config.checks import flag_name
from megatron_eagle.config.flags import add_eagle_flags, given_options, parse_eagle_flags


def test_every_option_is_a_flag_and_comes_back() -> None:
    parser = add_eagle_flags(argparse.ArgumentParser())
    assert EagleConfig.from_args(parser.parse_args([])) == EagleConfig()
    shown = parser.format_help()
    for option in dataclasses.fields(EagleConfig):
        assert flag_name(option.name) in shown
    words = "--eagle-ttt-steps 5 --eagle-aux-layers 0 3 7 --eagle-detach-steps"
    options = EagleConfig.from_args(parser.parse_args(words.split()))
    assert options == EagleConfig(ttt_steps=5, aux_layers=(0, 3, 7), detach_steps=True)
    assert EagleConfig.from_mapping(options.to_mapping()) == options


def test_default_aux_layers_follow_from_the_base_s_depth() -> None:
    assert EagleConfig().captured_layers(32) == (1, 15, 28)
    assert EagleConfig().captured_layers(7) == (1, 2, 3)
    with pytest.raises(ValueError, match="--eagle-aux-layers must be given"):
        EagleConfig().captured_layers(6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ttt_steps": 0}, "--eagle-ttt-steps must be at least 1, not 0"),
        ({"ttt_steps": -2}, "--eagle-ttt-steps must be at least 1, not -2"),
        ({"num_layers": 0}, "--eagle-num-layers must be at least 1"),
        ({"draft_vocab_size": 0}, "--eagle-draft-vocab-size must be at least 1"),
        ({"loss_chunk_mib": 0}, "--eagle-loss-chunk-mib must be at least 1, not 0"),
        ({"step_decay": 0.0}, r"--eagle-step-decay must be in \(0, 1\]"),
        ({"aux_layers": (3, 3)}, "--eagle-aux-layers names a layer twice: 3 3"),
        ({"aux_layers": (5, 2)}, "--eagle-aux-layers must ascend: 5 2"),
        ({"aux_layers": (-1, 2)}, "--eagle-aux-layers must not be negative"),
        ({"aux_layers": ()}, "--eagle-aux-layers needs at least one layer"),
        ({"kv_channels": 0}, "--eagle-kv-channels must be at least 1, not 0"),
        ({"kv_channels": 7}, "--eagle-kv-channels 7 is odd"),
        ({"attention": "mha"}, "--eagle-attention must be one of gqa, mla, not mha"),
        ({"kv_lora_rank": 8}, "--eagle-kv-lora-rank 8: a draft of --eagle-attention gqa has no"),
        ({"attention": "mla", "kv_channels": 8}, "--eagle-kv-channels 8: a draft of --eagle-att"),
        ({"attention": "mla", "q_lora_rank": -1}, "--eagle-q-lora-rank must be at least 0, not"),
        ({"attention": "mla", "qk_pos_emb_head_dim": 5}, "--eagle-qk-pos-emb-head-dim 5 is odd"),
        ({"loss": "mse"}, "--eagle-loss must be one of kl, ce, .* not mse"),
        ({"lk_decay": 2.0}, "--eagle-lk-decay 2.0: only --eagle-loss lk-lambda"),
        ({"loss": "lk-lambda", "lk_decay": -2.0}, "--eagle-lk-decay must not be negative: -2.0"),
        ({"moe_router_topk": 2}, "--eagle-moe-router-topk 2: only a MoE draft"),
        ({"num_experts": 2, "moe_router_topk": 3}, "3 experts of a token, but --eagle-num-exp"),
        ({"num_experts": 4, "moe_aux_loss_coeff": -1.0}, "aux-loss-coeff must not be negative"),
        ({"mask_token": 3}, "--eagle-mask-token 3: only --eagle-algorithm p-eagle"),
        ({"algorithm": "p-eagle"}, "--eagle-mask-token: .* needs the id of a token"),
        ({"algorithm": "p-eagle", "mask_token": 3, "detach_steps": True}, "--eagle-detach-steps:"),
        ({"init_from_base": True, "warm_start": "d"}, "init-from-base: --eagle-warm-start d"),
        ({"init_from_base": True, "num_experts": 2}, "--eagle-init-from-base: --eagle-num-experts"),
        ({"init_from_base": True, "algorithm": "eagle1"}, "--eagle-init-from-base: .* eagle1"),
        ({"algorithm": "eagle4"}, "--eagle-algorithm must be one of eagle1, eagle3, eagle3.1"),
        ({"algorithm": "eagle1", "aux_layers": (1, 2)}, "--eagle-aux-layers 1 2: --eagle-algor"),
        ({"algorithm": "eagle1", "draft_vocab_size": 9}, "--eagle-draft-vocab-size 9: .* eagle1"),
        ({"algorithm": "eagle1", "norm_before_fc": True}, "--eagle-norm-before-fc: .* eagle1"),
        ({"algorithm": "eagle1", "regression_weight": -1.0}, "weight must not be negative: -1.0"),
        ({"regression_weight": 1.0}, "--eagle-regression-weight 1.0: only .* eagle1"),
        ({"algorithm": "eagle3.1", "norm_before_fc": True}, "--eagle-norm-before-fc: .*eagle3.1"),
        ({"eval_interval": 5}, "--eagle-eval-interval 5 needs --eagle-eval-prompts"),
        ({"eval_prompts": "p", "eval_draft_tokens": 0}, "--eagle-eval-draft-tokens must be at l"),
        ({"eval_prompts": "p", "offline_features": "f"}, "--eagle-eval-prompts: .* no base"),
    ],
)
def test_impossible_options_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EagleConfig(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EagleConfig(aux_layers=(1, 8)), "--eagle-aux-layers 8 is out of range"),
        (EagleConfig(draft_vocab_size=101), "--eagle-draft-vocab-size 101 exceeds"),
        (EagleConfig(algorithm="p-eagle", mask_token=100), "--eagle-mask-token 100 is outside"),
        (EagleConfig(ttt_steps=7), "--seq-length 8 is too short: --eagle-ttt-steps 7"),
    ],
)
def test_options_that_the_base_cannot_honour_are_refused(
    options: EagleConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        options.check_against_base(base_layers=8, vocab_size=100, seq_length=8)


def test_widths_are_the_base_s_unless_given() -> None:
    base = {"ffn_hidden_size": 96, "num_attention_heads": 8, "num_query_groups": 2}
    base["kv_channels"] = 16
    assert EagleConfig().layer_widths(base) == base
    given = EagleConfig(num_attention_heads=4, ffn_hidden_size=50).layer_widths(base)
    assert given == base | {"num_attention_heads": 4, "ffn_hidden_size": 50}
    mha = base | {"num_query_groups": 8}
    assert EagleConfig(num_attention_heads=6).layer_widths(mha)["num_query_groups"] == 6
    with pytest.raises(ValueError, match=r"--eagle-num-query-groups: 3 .* draft's 8 attention"):
        EagleConfig(num_query_groups=3).layer_widths(base)


def test_widths_of_an_mla_draft_are_those_of_its_attention() -> None:
    base = {"ffn_hidden_size": 96, "num_attention_heads": 8, "num_query_groups": 8}
    mla = {"kv_lora_rank": 12, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 5}
    args = base | mla | {"kv_channels": 6, "multi_latent_attention": True}
    found = EagleConfig(attention="mla", num_attention_heads=4, v_head_dim=7).layer_widths(args)
    own = {"ffn_hidden_size": 96, "num_attention_heads": 4, "q_lora_rank": 0}
    assert found == own | mla | {"v_head_dim": 7}
    with pytest.raises(ValueError, match=r"--eagle-v-head-dim 11: values are wider .* 6 \+ 4 chan"):
        EagleConfig(attention="mla", v_head_dim=11).layer_widths(args)
    with pytest.raises(ValueError, match="--eagle-attention mla: the base has no multi-latent"):
        EagleConfig(attention="mla").layer_widths(base)


def test_a_base_is_required() -> None:
    with pytest.raises(ValueError, match="--eagle-base-checkpoint is required"):
        parse_eagle_flags(["--eagle-ttt-steps", "2", "--some-megatron-flag", "3"])


def test_given_options_are_those_that_were_typed() -> None:
    words = ["--lr", "1", "--eagle-num-layers", "1", "--eagle-aux-layers", "1", "2", "--eagle-nvtx"]
    assert given_options(words) == {"num_layers", "aux_layers", "nvtx"}
    assert given_options([]) == set()
