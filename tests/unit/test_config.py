"""DraftSpec, TrainOptions and EagleConfig: flags, defaults and checks."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from megatron_eagle.algorithms import ALGORITHMS, SPECIAL_OPTIONS
from megatron_eagle.config import DraftSpec, EagleConfig, TrainOptions
from megatron_eagle.config.eagle_config import OPTIONS
from megatron_eagle.config.flags import add_eagle_flags, given_options, parse_eagle_flags
from megatron_eagle.config.option import flag_name, names
from megatron_eagle.config.widths import layer_widths
from megatron_eagle.errors import UserError


def test_every_option_is_a_flag_and_comes_back() -> None:
    parser = add_eagle_flags(argparse.ArgumentParser())
    assert EagleConfig.from_args(parser.parse_args([])) == EagleConfig()
    shown = parser.format_help()
    for name in OPTIONS:
        assert flag_name(name) in shown
    words = "--eagle-ttt-steps 5 --eagle-aux-layers 0 3 7 --eagle-detach-steps"
    config = EagleConfig.from_args(parser.parse_args(words.split()))
    assert config == EagleConfig.of(ttt_steps=5, aux_layers=(0, 3, 7), detach_steps=True)
    assert config.spec.aux_layers == (0, 3, 7) and config.train.ttt_steps == 5


def test_no_option_belongs_to_both_parts() -> None:
    assert not set(names(DraftSpec)) & set(names(TrainOptions))
    assert set(OPTIONS) >= SPECIAL_OPTIONS


def test_a_stored_spec_comes_back_and_is_read_strictly() -> None:
    spec = DraftSpec(algorithm="p-eagle", mask_token=3, aux_layers=(1, 2, 5), ffn_hidden_size=8)
    assert DraftSpec.from_mapping(spec.to_mapping()) == spec
    for changes, message in (
        ({"tree_size": 4}, "unknown field 'tree_size'"),
        ({"num_layers": "1"}, "num_layers must be of type int, found '1'"),
        ({"num_layers": True}, "num_layers must be of type int, found True"),
        ({"norm_before_fc": 1}, "norm_before_fc must be of type bool, found 1"),
        ({"aux_layers": [1, "2"]}, "aux_layers must be of type int"),
        (
            {"algorithm": "eagle4"},
            "must be one of eagle1, eagle3, eagle3.1, p-eagle, dflash, dspark",
        ),
        ({"mask_token": None}, "mask_token: algorithm p-eagle needs it"),
    ):
        with pytest.raises(UserError, match=message):
            DraftSpec.from_mapping({**spec.to_mapping(), **changes})


def test_default_aux_layers_follow_from_the_base_s_depth() -> None:
    assert DraftSpec().aux_layers_of(32) == (1, 15, 28)
    assert DraftSpec().aux_layers_of(7) == (1, 2, 3)
    assert DraftSpec(algorithm="eagle1").aux_layers_of(2) == ()
    with pytest.raises(UserError, match="aux_layers must be given for a base of 6 layers"):
        DraftSpec().aux_layers_of(6)


BLOCKS = {"algorithm": "dflash", "mask_token": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ttt_steps": 0}, "ttt_steps must be at least 1, not 0"),
        ({"ttt_steps": -2}, "ttt_steps must be at least 1, not -2"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"draft_vocab_size": 0}, "draft_vocab_size must be at least 1"),
        ({"loss_chunk_mib": 0}, "loss_chunk_mib must be at least 1, not 0"),
        ({"step_decay": 0.0}, r"step_decay must be in \(0, 1\]"),
        ({"aux_layers": (3, 3)}, "aux_layers names a layer twice: 3 3"),
        ({"aux_layers": (5, 2)}, "aux_layers must ascend: 5 2"),
        ({"aux_layers": (-1, 2)}, "aux_layers must not be negative"),
        ({"aux_layers": ()}, "aux_layers needs at least one layer"),
        ({"kv_channels": 0}, "kv_channels must be at least 1, not 0"),
        ({"kv_channels": 7}, "kv_channels 7 is odd"),
        ({"attention": "mha"}, "attention must be one of gqa, mla, not mha"),
        ({"kv_lora_rank": 8}, "kv_lora_rank 8: a draft of attention gqa has no"),
        ({"attention": "mla", "kv_channels": 8}, "kv_channels 8: a draft of attention mla has no"),
        ({"attention": "mla", "q_lora_rank": -1}, "q_lora_rank must be at least 0, not -1"),
        ({"attention": "mla", "qk_pos_emb_head_dim": 5}, "qk_pos_emb_head_dim 5 is odd"),
        ({"loss": "mse"}, "loss must be one of kl, ce, .* not mse"),
        ({"lk_decay": 2.0}, "lk_decay 2.0: only loss lk-lambda"),
        ({"loss": "lk-lambda", "lk_decay": -2.0}, "lk_decay must be at least 0, not -2.0"),
        ({"moe_router_topk": 2}, "moe_router_topk 2: only a MoE draft"),
        ({"num_experts": 2, "moe_router_topk": 3}, "3 experts of a token, but num_experts 2"),
        ({"num_experts": 4, "moe_aux_loss_coeff": -1.0}, "moe_aux_loss_coeff must be at least 0"),
        ({"moe_aux_loss_coeff": 0.1}, "moe_aux_loss_coeff 0.1: only a MoE draft"),
        ({"mask_token": 3}, "mask_token 3: algorithm eagle3 drafts its tokens in turn"),
        ({"algorithm": "p-eagle"}, "mask_token: algorithm p-eagle needs it"),
        ({"algorithm": "p-eagle", "mask_token": -1}, "mask_token must be at least 0, not -1"),
        (
            {"algorithm": "p-eagle", "mask_token": 3, "detach_steps": True},
            "detach_steps: algorithm p-eagle feeds nothing from step to step",
        ),
        ({"init_from_base": True, "warm_start": "d"}, "init_from_base: warm_start d starts"),
        ({"init_from_base": True, "num_experts": 2}, "init_from_base: num_experts 2 starts"),
        ({"init_from_base": True, "algorithm": "eagle1"}, "init_from_base: algorithm eagle1 reads"),
        ({"algorithm": "eagle4"}, "algorithm must be one of eagle1, eagle3, eagle3.1"),
        ({"algorithm": "eagle1", "aux_layers": (1, 2)}, "aux_layers 1 2: algorithm eagle1 reads"),
        ({"algorithm": "eagle1", "draft_vocab_size": 9}, "draft_vocab_size 9: .* eagle1 shares"),
        ({"algorithm": "eagle1", "norm_before_fc": True}, "norm_before_fc: algorithm eagle1 reads"),
        ({"algorithm": "eagle1", "offline_features": "f"}, "offline_features f: algorithm eagle1"),
        ({"algorithm": "eagle1", "regression_weight": -1.0}, "regression_weight must be at least"),
        ({"regression_weight": 1.0}, "regression_weight 1.0: algorithm eagle3 does not regress"),
        ({"algorithm": "eagle3.1", "norm_before_fc": True}, "norm_before_fc: algorithm eagle3.1"),
        ({"eval_interval": 5}, "eval_interval 5 needs eval_prompts"),
        ({"eval_prompts": "p", "eval_draft_tokens": 0}, "eval_draft_tokens must be at least 1"),
        ({"eval_prompts": "p", "offline_features": "f"}, "eval_prompts: .* no base"),
        ({"pack": True}, "pack needs train_data"),
        ({"algorithm": "dflash"}, "mask_token: algorithm dflash needs it"),
        ({**BLOCKS, "block_size": 1}, "block_size must be at least 2, not 1"),
        ({**BLOCKS, "anchors": 0}, "anchors must be at least 1, not 0"),
        ({**BLOCKS, "ttt_steps": 5}, "ttt_steps 5: algorithm dflash drafts a block in one pass"),
        ({**BLOCKS, "loss": "tv"}, "loss tv: algorithm dflash mixes its losses by ce_weight"),
        ({**BLOCKS, "ce_weight": 0.0}, "ce_weight, kl_weight and l1_weight are all 0"),
        (
            {**BLOCKS, "accuracy_target": "data", "kl_weight": 0.5},
            "accuracy_target data spares what kl_weight",
        ),
        ({**BLOCKS, "position_decay": 0.0}, "position_decay must be above 0"),
        (
            {**BLOCKS, "position_decay": 2.0, "position_weights": "d-pace"},
            "position_decay 2.0: position_weights d-pace has none",
        ),
        ({**BLOCKS, "markov_rank": 8}, "markov_rank 8: algorithm dflash drafts all slots at once"),
        (
            {**BLOCKS, "algorithm": "dspark", "confidence_weight": 1.0},
            "confidence_weight 1.0: the draft has no confidence_head",
        ),
        ({"train_data": "t", "offline_features": "f"}, "train_data and offline_features: feat"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EagleConfig.of(**changes)


@pytest.mark.parametrize("name", sorted(SPECIAL_OPTIONS))
def test_an_algorithm_refuses_every_option_that_it_does_not_have(name: str) -> None:
    """An option without effect is a mistake, whichever algorithm lacks it."""
    values = {"aux_layers": (1,), "draft_vocab_size": 5, "mask_token": 3, "regression_weight": 1.0}
    flags = ("norm_before_fc", "norm_before_residual", "detach_steps", "mask_out_of_vocab")
    values |= dict.fromkeys((*flags, "init_from_base", "confidence_head"), True)
    values |= {"ttt_steps": 4, "step_decay": 0.5, "loss": "ce", "attention": "mla", "anchors": 3}
    values |= {"num_experts": 4, "block_size": 4, "markov_head": "rnn", "markov_rank": 4}
    values |= {"position_weights": "d-pace", "position_decay": 2.0, "accuracy_target": "base"}
    values |= dict.fromkeys(("ce_weight", "kl_weight", "l1_weight", "confidence_weight"), 0.5)
    for algorithm in ALGORITHMS.values():
        options = {"algorithm": algorithm.name, name: values.get(name, "a-file")}
        if "mask_token" in algorithm.required:
            options.setdefault("mask_token", 3)
        if name == "confidence_weight" and "confidence_head" in algorithm.options:
            options["confidence_head"] = True
        if name in algorithm.options:
            EagleConfig.of(**options)
        else:
            with pytest.raises(UserError, match=rf"{name}.*: algorithm {algorithm.name} "):
                EagleConfig.of(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aux_layers": (1, 8)}, "aux_layers 8 is out of range"),
        ({"draft_vocab_size": 101}, "draft_vocab_size 101 exceeds"),
        ({"algorithm": "p-eagle", "mask_token": 100}, "mask_token 100 is outside"),
        ({"ttt_steps": 7}, "seq_length 8 is too short: ttt_steps 7"),
        (
            {"algorithm": "dspark", "mask_token": 1, "block_size": 7, "aux_layers": (1,)},
            "seq_length 8 is too short: block_size 7",
        ),
        ({"algorithm": "dflash", "mask_token": 100, "aux_layers": (1,)}, "mask_token 100 is out"),
        ({"algorithm": "dflash", "mask_token": 1}, "aux_layers must be given for a base of 8"),
        ({"algorithm": "dflash", "mask_token": 1, "aux_layers": (8,)}, "aux_layers 8 is out of r"),
    ],
)
def test_options_that_the_base_cannot_honour_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        EagleConfig.of(**options).check_against_base(base_layers=8, vocab_size=100, seq_length=8)


def test_widths_are_the_base_s_unless_given() -> None:
    base = {"ffn_hidden_size": 96, "num_attention_heads": 8, "num_query_groups": 2}
    base["kv_channels"] = 16
    assert layer_widths(DraftSpec(), base) == base
    narrow = layer_widths(DraftSpec(num_attention_heads=4, ffn_hidden_size=50), base)
    assert narrow == base | {"num_attention_heads": 4, "ffn_hidden_size": 50}
    mha = base | {"num_query_groups": 8}
    assert layer_widths(DraftSpec(num_attention_heads=6), mha)["num_query_groups"] == 6
    with pytest.raises(UserError, match=r"num_query_groups: 3 .* draft's 8 attention"):
        layer_widths(DraftSpec(num_query_groups=3), base)


def test_widths_of_an_mla_draft_are_those_of_its_attention() -> None:
    base = {"ffn_hidden_size": 96, "num_attention_heads": 8, "num_query_groups": 8}
    mla = {"kv_lora_rank": 12, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 5}
    args = base | mla | {"kv_channels": 6, "multi_latent_attention": True}
    widths = layer_widths(DraftSpec(attention="mla", num_attention_heads=4, v_head_dim=7), args)
    own = {"ffn_hidden_size": 96, "num_attention_heads": 4, "q_lora_rank": 0}
    assert widths == own | mla | {"v_head_dim": 7}
    with pytest.raises(UserError, match=r"v_head_dim 11: values are wider .* 6 \+ 4 chan"):
        layer_widths(DraftSpec(attention="mla", v_head_dim=11), args)
    with pytest.raises(UserError, match="attention mla: the base has no multi-latent"):
        layer_widths(DraftSpec(attention="mla"), base)


def test_a_base_is_required() -> None:
    with pytest.raises(UserError, match="base_checkpoint is required"):
        parse_eagle_flags(["--eagle-ttt-steps", "2", "--some-megatron-flag", "3"])


def test_given_options_are_those_that_were_typed() -> None:
    words = ["--lr", "1", "--eagle-num-layers", "1", "--eagle-aux-layers", "1", "2", "--eagle-nvtx"]
    assert given_options(words) == {"num_layers", "aux_layers", "nvtx"}
    assert given_options([]) == set()


def test_an_error_names_parameters_until_a_command_names_its_flags() -> None:
    with pytest.raises(UserError) as caught:
        TrainOptions(pack=True)
    assert str(caught.value) == "pack needs train_data: data_path has no documents"
    shown = caught.value.named(lambda name: flag_name(name) if name in OPTIONS else f"--{name}")
    assert shown == "--eagle-pack needs --eagle-train-data: --data_path has no documents"


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (28, (1, 7, 13, 19, 25)), (30, (1, 8, 14, 20, 27)), (32, (1, 8, 15, 22, 29)),
        (36, (1, 9, 17, 25, 33)), (48, (1, 12, 23, 34, 45)), (61, (1, 15, 30, 44, 58)),
        (62, (1, 16, 30, 44, 59)),
    ],
)  # fmt: skip
def test_a_block_draft_reads_five_layers(layers: int, expected: tuple[int, ...]) -> None:
    assert DraftSpec(algorithm="dflash", mask_token=1).aux_layers_of(layers) == expected


def test_how_many_tokens_a_block_drafts() -> None:
    assert EagleConfig.of(algorithm="dflash", mask_token=1, block_size=16).steps == 15
    assert EagleConfig.of(algorithm="dspark", mask_token=1, block_size=7).steps == 7
