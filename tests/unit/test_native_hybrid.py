"""What the arguments of a HybridModel say, which of its layers count, and how a run cuts it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eagle.checkpoint.base_description import read_base
from megatron_eagle.checkpoint.directory import BaseInfo, parse_base
from megatron_eagle.checkpoint.hybrid_pattern import for_stages, layer_ends
from megatron_eagle.cli.describe_base import main as describe_base
from megatron_eagle.config import EagleConfig
from megatron_eagle.decode.cache import KeyValueCache
from megatron_eagle.errors import UserError
from megatron_eagle.training.hybrid_flags import check_recurrent, run_pattern
from megatron_eagle.training.megatron_flags import megatron_flags
from tests.helpers.native_files import HIDDEN, chunk, namespace, save

DELTA_NET = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def hybrid(folder: Path, pattern: str, **changes: Any) -> Path:
    """A checkpoint whose tensors are one norm per layer of ``pattern``."""
    layers = len(pattern.split("/")[0].replace("|", ""))
    norms = [chunk(f"decoder.layers.{i}.norm.weight", HIDDEN) for i in range(layers)]
    arguments = {"hybrid_layer_pattern": pattern, "num_layers": layers, **changes}
    return save(folder, namespace(**arguments), *norms, stacked=False)


@pytest.mark.parametrize(
    ("pattern", "ends"),
    [
        ("*-*E|*-", [1, 3, 5]),
        ("G-*E", [1, 3]),
        ("+-+E", [1, 3]),
        ("*-*", [0, 1, 2]),
        ("M-*-", [0, 1, 2, 3]),
        ("M*-E", [0, 1, 2, 3]),
    ],
)
def test_layers_count_as_hugging_face_counts_them(
    pattern: str, ends: list[int], tmp_path: Path
) -> None:
    assert layer_ends(pattern) == ends
    sizes = {**DELTA_NET, "mamba_state_dim": 8, "mamba_head_dim": 4, "mamba_num_groups": 2}
    latent = {"multi_latent_attention": True, "kv_lora_rank": 4, "qk_head_dim": 2}
    latent |= {"qk_pos_emb_head_dim": 2, "v_head_dim": 2} if "+" in pattern else {}
    experts = {"num_experts": 4, "moe_router_topk": 2, **(latent if "+" in pattern else {})}
    base = read_base(hybrid(tmp_path / "model", pattern, **sizes, **experts))
    assert base.family == "megatron-hybrid" and base.is_native
    assert base.megatron_args["num_layers"] == base.hf_config["num_hidden_layers"] == len(ends)
    words = megatron_flags(base.megatron_args)
    assert words[words.index("--num-layers") + 1] == str(len(pattern.replace("|", "")))
    assert f"--hybrid-layer-pattern={pattern}" in words
    assert parse_base(base.as_dict(), "x") == base


def test_what_a_hybrid_ignores_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ignored = {"use_rope_scaling": True, "qk_layernorm": True, "qk_l2_norm": True}
    ignored |= {"num_experts": 4, "moe_router_topk": 2}
    root = hybrid(tmp_path / "model", "*-*-/*-/*-", **ignored)
    base = read_base(root)
    args = base.megatron_args
    assert args["hybrid_layer_pattern"] == "*-*-" and not args["qk_layernorm"]
    assert not {"use_rope_scaling", "qk_l2_norm", "num_experts", "moe_router_topk"} & set(args)
    assert describe_base([str(root)]) == 0
    shown = capsys.readouterr().out
    assert "counted from 0 to 1, each two symbols of *-*-" in shown
    old = hybrid(tmp_path / "old", "M*", mamba_state_dim=8, mamba_head_dim=4, mamba_num_groups=2)
    arguments = namespace(hybrid_layer_pattern=None, hybrid_override_pattern="M*")
    for name in ("mamba_state_dim", "mamba_head_dim", "mamba_num_groups"):
        setattr(arguments["args"], name, 8)
    torch.save(arguments, old / "iter_0000010" / "common.pt")
    assert read_base(old).megatron_args["hybrid_layer_pattern"] == "M*"


@pytest.mark.parametrize(
    ("pattern", "changes", "message"),
    [
        ("D-", {}, "hybrid_layer_pattern D- is not supported, only a pattern of"),
        ("*-+-", {}, r"not both \* and \+"),
        ("G-", {}, "lack linear_conv_kernel_dim"),
        ("M-", {}, "lack mamba_state_dim"),
        ("*E", {}, "lack num_experts"),
        ("*-", {"hybrid_layer_pattern": "*-*-"}, "pattern of 4, but there are 2 layers"),
        ("*-", {"hybrid_layer_pattern": None, "is_hybrid_model": True}, "by ratios of layers"),
    ],
)
def test_a_pattern_that_cannot_be_built_is_one_line(
    pattern: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_base(hybrid(tmp_path / "model", pattern, **changes))
    assert "\n" not in str(error.value)


def described(pattern: str | None) -> BaseInfo:
    args = {} if pattern is None else {"hybrid_layer_pattern": pattern, **DELTA_NET}
    return BaseInfo("megatron-hybrid", "x", "0", 8, {}, args)


def test_a_run_may_cut_the_pattern_and_not_change_it() -> None:
    base = described("*-|*-")
    assert run_pattern([], base, 2) == "*-|*-" and run_pattern([], base, 1) == "*-*-"
    assert for_stages("*-|*-", 4) == "*-*-"
    assert run_pattern(["--hybrid-layer-pattern", "*-*|-"], base, 2) == "*-*|-"
    assert run_pattern(["--hybrid-layer-pattern=*-*-"], base, 2) == "*-*-"
    assert run_pattern([], described(None), 2) is None
    for words, of, message in (
        (["--hybrid-layer-pattern", "*-"], base, r"contradicts the base checkpoint: \*-\|\*-"),
        (["--hybrid-layer-pattern", "*-|*|-"], base, "cuts other than --pipeline-model-parallel"),
        (["--hybrid-layer-pattern", "*-*-"], described(None), "the base is a GPTModel"),
    ):
        with pytest.raises(UserError, match=message):
            run_pattern(words, of, 2)


def test_recurrent_layers_refuse_what_they_cannot_do() -> None:
    layout = argparse.Namespace(
        tensor_model_parallel_size=2, context_parallel_size=2, sequence_parallel=False
    )
    with pytest.raises(UserError, match="does not divide the base's linear_num_key_heads = 2"):
        check_recurrent(layout, described("G-"), EagleConfig.of())
    layout.context_parallel_size = 1
    with pytest.raises(UserError, match="--eagle-pack: the base has recurrent layers"):
        check_recurrent(layout, described("G-"), EagleConfig.of(pack=True, train_data="x"))
    check_recurrent(layout, described("*-"), EagleConfig.of(pack=True, train_data="x"))
    layout.sequence_parallel = True
    with pytest.raises(UserError, match="--eagle-eval-prompts beside --sequence-parallel"):
        check_recurrent(layout, described("G-"), EagleConfig.of(eval_prompts="x", train_data="x"))


def test_a_cache_remembers_the_inputs_of_recurrent_layers() -> None:
    """A cumulative sum with memory, which takes tokens back, equals one over the whole."""
    hidden = torch.randn(6, 2, 3)
    cache = KeyValueCache(8)

    def run(rows: torch.Tensor, positions: list[list[int]]) -> torch.Tensor:
        cache.place(torch.tensor(positions))
        return cache.at_positions(cache.remember(1, rows).cumsum(0))

    first = run(hidden[:4], [[0, 1, 2, 3]] * 2)
    assert first.equal(hidden.cumsum(0)[:4])
    run(torch.randn(2, 2, 3), [[4, 5]] * 2)  # rejected
    ragged = torch.stack([hidden[4, 0], hidden[3, 1]]).unsqueeze(0)
    again = run(ragged, [[4], [3]])
    torch.testing.assert_close(again[0, 0], hidden[:5, 0].sum(0))
    torch.testing.assert_close(again[0, 1], hidden[:4, 1].sum(0))
    cache.keep(torch.tensor([1]))
    last = run(hidden[4:5, 1:], [[4]])
    torch.testing.assert_close(last[0, 0], hidden[:5, 1].sum(0))
