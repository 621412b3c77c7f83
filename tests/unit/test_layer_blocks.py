"""GPTs whose layers differ in their parts: what is read of them, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_eagle.checkpoint.base_description import read_base
from megatron_eagle.checkpoint.base_fields import cut_sizes
from megatron_eagle.checkpoint.directory import BaseInfo, parse_base
from megatron_eagle.checkpoint.layer_blocks import BLOCKS, PATH, Block, blocks_of
from megatron_eagle.config import DraftSpec, EagleConfig, TrainOptions
from megatron_eagle.errors import UserError
from megatron_eagle.training.base_start import check_base_start
from megatron_eagle.training.megatron_flags import megatron_flags
from tests.helpers.native_files import HIDDEN, chunk, namespace, save

ATTENTION, MATRIX = {"n_heads_in_group": 2}, {"replace_with_linear": True}
NOTHING = {"no_op": True, "n_heads_in_group": None, "ffn_mult": None}
OWN = {"ffn_hidden_size": 24}


def text(*blocks: tuple[dict[str, Any], dict[str, Any]], mlp: str = "ffn") -> str:
    """The part of a config.json that says which layers there are."""
    content = [{"attention": attention, mlp: part} for attention, part in blocks]
    return json.dumps({"block_configs": content})


def read(folder: Path, layers: str, *numbers: int, **changes: Any) -> BaseInfo:
    """Describe a checkpoint with ``layers`` of which those of ``numbers`` have weights."""
    said = {PATH: "", BLOCKS: layers, "use_rope_scaling": True, **changes}
    norms = [chunk(f"decoder.layers.{i}.input_layernorm.weight", HIDDEN) for i in numbers]
    return read_base(save(folder / "model", namespace(**said), *norms, stacked=False))


def test_layers_have_one_spelling(tmp_path: Path) -> None:
    parts = [(ATTENTION, OWN), (NOTHING, {"ffn_mult": 1.5}), (MATRIX, NOTHING), (NOTHING, MATRIX)]
    parts += [({"num_query_groups": None}, {"ffn_hidden_size": None}), (NOTHING, NOTHING)]
    base = read(tmp_path, text(*parts), 0, 1, 2, 3, 4, num_layers=6)
    blocks = blocks_of(base.megatron_args)
    assert blocks == [
        Block(True, 24), Block(False, 256), Block(False, None, attention_matrix=True),
        Block(False, None, ffn_matrix=True), Block(True, 16), Block(False, None),
    ]  # fmt: skip
    assert read(tmp_path, text(*parts, mlp="mlp"), 0, 1, 2, 3, 4, num_layers=6) == base
    assert read(tmp_path, base.megatron_args[BLOCKS], 0, 1, 2, 3, 4, num_layers=6) == base
    assert parse_base(base.as_dict(), "x") == base
    sizes = cut_sizes(base.megatron_args)
    assert sizes["ffn_hidden_size of layer 0"] == 24 and sizes["ffn_hidden_size of layer 4"] == 16
    words = megatron_flags(base.megatron_args)
    assert words[words.index("--heterogeneous-layers-config-path") + 1] == ""
    assert base.megatron_args[BLOCKS] in words and "--use-rotary-position-embeddings" in words


FULL = (ATTENTION, OWN)


@pytest.mark.parametrize(
    ("layers", "changes", "message"),
    [
        (text(FULL, FULL), {"use_rope_scaling": False}, "use_rope_scaling None beside hetero"),
        (text(FULL, FULL), {"normalization": "LayerNorm"}, "normalization LayerNorm beside"),
        (text(FULL, FULL), {"num_experts": 2, "moe_router_topk": 1}, "num_experts 2 beside"),
        (text(FULL, FULL), {"num_query_groups": 4}, "group_query_attention False beside"),
        (text(FULL), {}, "num_layers 2, but heterogeneous_layers_config_encoded_json has 1"),
        (text(FULL, ({"n_heads_in_group": 1}, OWN)), {}, "a layer with 4.0 query groups"),
        (text(FULL, (ATTENTION, {"ffn_hidden_size": -1})), {}, "an MLP of width -1"),
        (text(FULL, (ATTENTION, {})), {}, "cannot be read"),
        ("[" * 100_000, {}, "cannot be read"),
        ("", {PATH: "layers.json"}, "the layers are in another file"),
        (text(FULL, FULL, FULL), {"num_layers": 3}, "num_layers 3, but there are 2 layers"),
    ],
)
def test_layers_that_cannot_be_built_are_one_line(
    layers: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, layers, 0, 1, **changes)
    assert "\n" not in str(error.value)


def test_a_description_may_not_contradict_itself(tmp_path: Path) -> None:
    described = read(tmp_path, text(FULL, FULL), 0, 1).as_dict()
    for changes in ({"rotary_base": 1}, {"use_rope_scaling": False}, {"num_layers": 3}):
        args = {**described["megatron_args"], **changes}
        with pytest.raises(UserError, match=f"x: {BLOCKS} contradicts the other arguments"):
            parse_base({**described, "megatron_args": args}, "x")


def test_only_plain_layers_start_a_draft(tmp_path: Path) -> None:
    base = read(tmp_path, text(FULL, (ATTENTION, {"ffn_hidden_size": None})), 0, 1)
    for layers in (1, 2):
        options = EagleConfig(DraftSpec(num_layers=layers), TrainOptions(init_from_base=True))
        if layers == 1:
            check_base_start(options, base)
        else:
            with pytest.raises(UserError, match="not attention with an MLP of ffn_hidden_size 16"):
                check_base_start(options, base)
