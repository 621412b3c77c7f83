"""The draft beside a base of every family: a plain Llama layer, whatever the base's layers are."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.config import DraftSpec
from megatron_eagle.draft.layer_config import draft_config, draft_rotary, own_rotary
from megatron_eagle.hf.base.families import FAMILIES, family_of
from megatron_eagle.hf.base.megatron_args import dims_of, megatron_args
from megatron_eagle.hf.base.rope_args import rope_beyond_args
from megatron_eagle.hf.draft.config_json import draft_config_json
from megatron_eagle.hf.draft.formats import FORMATS
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.tables.entries import with_symbols
from megatron_eagle.teacher.build import base_config
from tests.helpers.tiny_hf import CLASSES, FIELDS, SIZES

BASES = {family.name: {} for family in FAMILIES.values()} | {
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
}


def base_of(name: str) -> BaseInfo:
    """What importing the tiny base would say of it."""
    import transformers

    family = name.partition("-")[0]
    fields = {**SIZES, **FIELDS[family], **BASES[name]}
    class_name = CLASSES[family]
    described = getattr(transformers, f"{class_name}Config")(**fields).to_json_string()
    architecture = {family.name: family.architecture for family in FAMILIES.values()}[family]
    config = {**json.loads(described), "architectures": [architecture]}
    table = family_of(config, "config.json")
    args = megatron_args(config, table, "config.json")
    rope = rope_beyond_args({**table.defaults, **config}, "config.json")
    return BaseInfo(name, name, "0" * 64, args["vocab_size"], config, args, rope)


@pytest.mark.parametrize("name", BASES)
def test_layers_have_nothing_that_readers_do_not_know(name: str) -> None:
    """No biases, windows, sinks, norms of queries and keys, other activations or experts."""
    base = base_of(name)
    config = draft_config(base_config(base, 1), DraftSpec())
    assert not config.add_bias_linear and not config.add_qkv_bias and not config.qk_layernorm
    assert config.window_size is None and config.softmax_type == "vanilla"
    assert config.activation_func is torch.nn.functional.silu and config.glu_linear_offset == 0.0
    assert config.num_moe_experts is None and not config.multi_latent_attention
    info = DraftInfo(DraftSpec(aux_layers=(0,)), base, 4)
    written = draft_config_json(info, FORMATS["vllm"], torch.float32)
    assert written["attention_bias"] is written["mlp_bias"] is False
    for field in ("sliding_window", "layer_types", "quantization_config", "partial_rotary_factor"):
        assert field not in written and field not in written["rope_parameters"]
    args = base.megatron_args
    shape = [args[name] for name in ("num_attention_heads", "num_query_groups", "kv_channels")]
    fields = ("num_attention_heads", "num_key_value_heads", "head_dim")
    assert [written[field] for field in fields] == shape
    assert shape == [config.num_attention_heads, config.num_query_groups, config.kv_channels]


@pytest.mark.parametrize("name", BASES)
def test_rope_is_the_one_that_readers_of_its_files_compute(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base's where it turns whole heads of grouped queries, else plain and of whole heads."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    monkeypatch.setattr("torch.cuda.current_device", lambda: torch.device("cpu"))
    base, spec = base_of(name), DraftSpec()
    info = DraftInfo(DraftSpec(aux_layers=(0,)), base, 4)
    written = draft_config_json(info, FORMATS["vllm"], torch.float32)
    reader = LlamaRotaryEmbedding(LlamaConfig(**written))
    angles = own_rotary(base, spec, torch.device("cpu"))(9)[:, 0, 0]
    half = angles.shape[1] // 2
    assert half == written["head_dim"] // 2
    torch.testing.assert_close(angles[:, :half], torch.outer(torch.arange(9.0), reader.inv_freq))

    def of_the_base(length: int) -> Any:
        raise AssertionError(length)

    shares = draft_rotary(of_the_base, base, spec, torch.device("cpu")).angles is of_the_base
    own = ("qwen3_next", "qwen3_5", "glm4_moe", "deepseek_v2", "deepseek_v3")
    assert shares == (base.family not in own)


@pytest.mark.parametrize("name", BASES)
def test_no_shape_symbol_has_two_meanings(name: str) -> None:
    """The draft's symbols leave the base's as they are, and a clash is an error."""
    base = base_of(name)
    of_base = dims_of(base.megatron_args)
    of_draft = DraftInfo(DraftSpec(aux_layers=(0,), draft_vocab_size=13), base, 4).dims
    assert of_draft["D"] == 13 and {symbol: of_draft[symbol] for symbol in of_base} == of_base
    with pytest.raises(AssertionError, match="two meanings: HD"):
        with_symbols(of_base, {"D": 13, "HD": 13})
