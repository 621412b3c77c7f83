"""The layouts beside the plain one, the model card's figures, and drafts a server cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from megatron_eagle.checkpoint.directory import ACCEPTED_LENGTH_NAME
from megatron_eagle.hf.draft.export import export_draft
from megatron_eagle.hf.draft.figures import ExportedCard, read_evaluation
from megatron_eagle.hf.draft.formats import FORMATS
from tests.helpers.trained_draft import TrainedDraft
from tests.reference.eagle3 import ReferenceEagle3

FIGURES = {
    "accepted_length": 2.3456,
    "acceptance": [0.7, 0.45, 0.1956],
    "prompts": 40,
    "draft_tokens": 3,
    "equal_to_greedy": True,
    "reinitialize": False,
}


def exported(tmp_path: Path, fmt: str, **changes: Any) -> tuple[TrainedDraft, Path]:
    draft = TrainedDraft.make(**changes)
    draft.save(tmp_path / "ckpt")
    export_draft(tmp_path / "ckpt", tmp_path / fmt, fmt=FORMATS[fmt])
    return draft, tmp_path / fmt


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("fmt", list(FORMATS))
def test_every_format_has_its_reader_s_tensor_names(tmp_path: Path, fmt: str, layers: int) -> None:
    draft, directory = exported(tmp_path, fmt, layers=layers)
    unread = {
        "vllm": "hidden_norm.weight",
        "speculators": "hidden_norm.weight",
        "sglang": "input_layernorm.weight",
        "trtllm": "input_layernorm.weight",
    }
    expected = {}
    for name, tensor in draft.hf.items():
        later = name.startswith("layers.") and not name.startswith("layers.0.")
        if later and name.endswith(unread.get(fmt, "none")):
            continue
        if fmt == "speculators":
            name = name.replace("midlayer.", "layers.0.")
        expected[name] = tensor
    found = load_file(directory / "model.safetensors")
    assert set(found) == set(expected)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_speculators_get_a_config_of_their_form(tmp_path: Path) -> None:
    _, directory = exported(tmp_path, "speculators")
    config = json.loads((directory / "config.json").read_text())
    layer = config.pop("transformer_layer_config")
    assert config == {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "torch_dtype": "float32",
        "draft_vocab_size": 19,
        "eagle_aux_hidden_state_layer_ids": [2, 5, 8],
        "norm_before_residual": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
            "verifier": {"name_or_path": "tiny-base", "architectures": ["LlamaForCausalLM"]},
        },
    }
    read = LlamaConfig(**layer)
    assert (read.hidden_size, read.head_dim, read.vocab_size) == (24, 10, 53)
    assert read.rope_parameters == {"rope_type": "default", "rope_theta": 50000.0}


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


@pytest.mark.parametrize("scaling", [YARN, {"rope_type": "linear", "factor": 2.0}])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters", "type"])
def test_scaled_rope_is_written_as_readers_expect_it(
    tmp_path: Path, spelling: str, scaling: dict[str, Any]
) -> None:
    """Both spellings whatever the base's; `type` is the oldest name of `rope_type`."""
    if spelling == "type":
        given = {"type": scaling["rope_type"], **scaling}
        del given["rope_type"]
        rope = {"rope_theta": 50000.0, "rope_scaling": given}
    else:
        rope = {"rope_theta": 50000.0, spelling: scaling}
    _, directory = exported(tmp_path, "hf", rope=rope)
    config = json.loads((directory / "config.json").read_text())
    assert config["rope_theta"] == 50000.0
    assert config["rope_scaling"] == scaling
    assert config["rope_parameters"] == {**scaling, "rope_theta": 50000.0}


@pytest.mark.parametrize("fmt", ["hf", "sglang", "trtllm"])
def test_one_captured_layer_is_refused_where_fc_would_be_skipped(tmp_path: Path, fmt: str) -> None:
    with pytest.raises(ValueError, match=r"skips fc .*; use format vllm or speculators$"):
        exported(tmp_path, fmt, aux_layers=(7,))
    assert not (tmp_path / fmt).exists()


REFUSED = [
    ("hf", {"algorithm": "eagle1", "draft_vocab": 53}, "fc.bias .*; use format vllm or sglang"),
    ("speculators", {"algorithm": "eagle1", "draft_vocab": 53}, "library has no EAGLE-1"),
    ("trtllm", {"algorithm": "eagle1", "draft_vocab": 53}, "TensorRT-LLM does not load EAGLE-1"),
    ("hf", {"algorithm": "p-eagle", "mask_token": 4}, "SGLang does not .* use format vllm"),
    ("speculators", {"algorithm": "p-eagle", "mask_token": 4}, "form is not known here"),
    ("hf", {"norm_before_residual": True}, "SGLang does not know .*use format vllm or specul"),
    ("trtllm", {"norm_before_residual": True}, "TensorRT-LLM does not know"),
    ("hf", {"qk_layernorm": True}, "SGLang has no norms of a draft's .*use format vllm or specul"),
]


@pytest.mark.parametrize(("fmt", "changes", "words"), REFUSED)
def test_drafts_that_a_reader_would_run_wrongly_are_refused(
    tmp_path: Path, fmt: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=f"^format {fmt}: .*{words}"):
        exported(tmp_path, fmt, **changes)
    assert not (tmp_path / fmt).exists()


@pytest.mark.parametrize(
    ("changes", "inner", "outer"),
    [
        ({}, {}, {}),
        ({"algorithm": "eagle3.1"}, {}, {"fc_norm": True, "norm_output": True}),
        ({"norm_before_fc": True}, {"norm_before_fc": True}, {"norm_before_fc": True}),
        ({"norm_before_residual": True}, {}, {"norm_before_residual": True}),
    ],
)
def test_norm_flags_are_where_readers_look(
    tmp_path: Path, changes: dict[str, Any], inner: dict[str, bool], outer: dict[str, bool]
) -> None:
    """Flags that are off are not written: SpecForge gives `norm_output: false` another meaning."""
    _, directory = exported(tmp_path, "vllm", **changes)
    config = json.loads((directory / "config.json").read_text())
    names = ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual")
    assert {name: config[name] for name in names if name in config} == outer
    found = config["eagle_config"]
    assert {name: found[name] for name in names if name in found} == inner


def test_a_p_eagle_draft_carries_its_mask_token_and_hidden(tmp_path: Path) -> None:
    draft, directory = exported(tmp_path, "vllm", algorithm="p-eagle", mask_token=4, layers=2)
    found = load_file(directory / "model.safetensors")
    assert found["mask_hidden"].shape == (1, 72) and found["mask_hidden"].equal(
        draft.hf["mask_hidden"]
    )
    config = json.loads((directory / "config.json").read_text())
    assert config["ptd_token_id"] == config["pard_token"] == 4
    assert '"parallel_drafting": true' in (directory / "README.md").read_text()
    model = ReferenceEagle3.from_hf(directory, torch.randn(53, 24))
    assert model.config.mask_token == 4 and model.mask_hidden.equal(draft.hf["mask_hidden"])


def test_a_draft_with_normed_queries_is_of_qwen3_type(tmp_path: Path) -> None:
    draft, directory = exported(tmp_path, "vllm", qk_layernorm=True, layers=2)
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["Eagle3Qwen3ForCausalLM"] and config["model_type"] == "qwen3"
    assert config["head_dim"] == 10 and config["attention_bias"] is False
    found = load_file(directory / "model.safetensors")
    for layer in range(2):
        for x in "qk":
            name = f"layers.{layer}.self_attn.{x}_norm.weight"
            assert found[name].equal(draft.hf[name]) and found[name].shape == (10,)
    _, nested = exported(tmp_path / "nested", "speculators", qk_layernorm=True)
    config = json.loads((nested / "config.json").read_text())
    assert config["transformer_layer_config"]["model_type"] == "qwen3"


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("fmt", ["vllm", "sglang"])
def test_an_eagle1_draft_is_written_as_its_readers_expect_it(
    tmp_path: Path, fmt: str, layers: int
) -> None:
    draft, directory = exported(tmp_path, fmt, algorithm="eagle1", draft_vocab=53, layers=layers)
    found = load_file(directory / "model.safetensors")
    bias = found.pop("fc.bias", None)
    assert (bias is not None) == (fmt == "sglang")
    assert bias is None or (bias.shape == (24,) and not bias.any())
    assert set(found) == set(draft.hf)
    assert all(found[name].equal(tensor) for name, tensor in draft.hf.items())
    config = json.loads((directory / "config.json").read_text())
    name = {"vllm": "EagleLlamaForCausalLM", "sglang": "LlamaForCausalLMEagle"}[fmt]
    assert config["architectures"] == [name] and "eagle_config" not in config
    card = (directory / "README.md").read_text()
    assert "# EAGLE-1 draft for" in card
    assert ('"method": "eagle",' in card) == (fmt == "vllm")
    assert ("--speculative-algorithm EAGLE " in card) == (fmt == "sglang")


@pytest.mark.parametrize("fmt", list(FORMATS))
def test_the_card_gives_the_commands_of_its_servers(tmp_path: Path, fmt: str) -> None:
    _, directory = exported(tmp_path, fmt)
    card = (directory / "README.md").read_text()
    for server, command in (
        ("vllm", "vllm serve BASE"),
        ("sglang", "sglang.launch_server --model-path BASE"),
        ("trtllm", "trtllm-serve BASE"),
    ):
        assert (command in card) == (server in FORMATS[fmt].servers)


def test_the_card_says_what_was_measured(tmp_path: Path) -> None:
    draft = TrainedDraft.make()
    draft.metadata["training"]["train_data"] = "/data/answers.jsonl"
    draft.save(tmp_path / "ckpt")
    (tmp_path / "eval.json").write_text(json.dumps(FIGURES))
    figures = read_evaluation(tmp_path / "eval.json")
    export_draft(tmp_path / "ckpt", tmp_path / "hf", evaluation=figures)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| training data | answers.jsonl |" in card
    assert "2.346 tokens per verification, greedy, chains of 3 drafts, 40 prompts" in card
    assert "0.700, 0.450, 0.196" in card
    export_draft(tmp_path / "ckpt", tmp_path / "own", data="10,000 chats")
    card = (tmp_path / "own" / "README.md").read_text()
    assert "| training data | 10,000 chats |" in card and "not measured" in card


def test_the_card_says_what_training_measured(tmp_path: Path) -> None:
    """Of a draft in SAVE/best, unless the tool's figures are given."""
    iteration = TrainedDraft.make().save(tmp_path / "best")
    measured = {**FIGURES, "iteration": 120, "accepted_length": 3.25}
    (iteration / ACCEPTED_LENGTH_NAME).write_text(json.dumps(measured))
    export_draft(tmp_path / "best", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "3.250 tokens per verification, greedy, chains of 3 drafts, 40 prompts, while tr" in card
    export_draft(tmp_path / "best", tmp_path / "own", evaluation=FIGURES)
    card = (tmp_path / "own" / "README.md").read_text()
    assert "2.346 tokens per verification" in card and "while training" not in card
    (iteration / ACCEPTED_LENGTH_NAME).write_text("{}")
    with pytest.raises(ValueError, match=f"{ACCEPTED_LENGTH_NAME}: accepted_length is missing"):
        export_draft(tmp_path / "best", tmp_path / "broken")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accepted_length": None}, "accepted_length is missing"),
        ({"reinitialize": True}, "not with trained weights"),
        ({"equal_to_greedy": False}, "were not the greedy ones"),
    ],
)
def test_figures_that_do_not_belong_on_a_card_are_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    (tmp_path / "eval.json").write_text(json.dumps({**FIGURES, **change}))
    with pytest.raises(ValueError, match=words):
        read_evaluation(tmp_path / "eval.json")
    with pytest.raises(ValueError, match=r"eval .*absent.json: no such file"):
        read_evaluation(tmp_path / "absent.json")


def test_a_card_takes_the_figures_of_its_own_draft(tmp_path: Path) -> None:
    draft = TrainedDraft.make()
    draft.save(tmp_path / "ckpt")
    export_draft(tmp_path / "ckpt", tmp_path / "hf", dtype=torch.bfloat16)
    ExportedCard.of(tmp_path / "hf", tmp_path / "ckpt").write(FIGURES)
    ExportedCard.of(tmp_path / "hf", tmp_path / "ckpt").write({**FIGURES, "prompts": 41})
    export_draft(tmp_path / "ckpt", tmp_path / "own", evaluation={**FIGURES, "prompts": 41})
    cards = [(tmp_path / name / "README.md").read_text() for name in ("hf", "own")]
    assert cards[0] == cards[1].replace("float32", "bfloat16") and "not measured" not in cards[0]
    draft.stored["draft.fc.weight"] = draft.hf["fc.weight"] + 1
    draft.save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"card .*hf: was not converted from the draft in"):
        ExportedCard.of(tmp_path / "hf", tmp_path / "other")
    with pytest.raises(ValueError, match="holds no draft that"):
        ExportedCard.of(tmp_path / "ckpt", tmp_path / "ckpt")
