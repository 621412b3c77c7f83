"""Importing drafts: what was exported comes back bit by bit, others' layouts are understood."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_eagle.checkpoint.directory import BASE_JSON_NAME, TRACKER_NAME
from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.checkpoint.writer import Chunk, write_torch_dist
from megatron_eagle.hf.draft.checkpoint import (
    open_checkpoint_draft,
    read_info,
    write_draft_checkpoint,
)
from megatron_eagle.hf.draft.export import export_draft
from megatron_eagle.hf.draft.formats import FORMATS
from tests.helpers.exported_draft import base_of, exported, imported, rewrite
from tests.helpers.trained_draft import TrainedDraft
from tests.helpers.trained_mla import DEEPSEEK_YARN, MLA_SIZES

ROOT = Path(__file__).parents[2]


def expected_tensors(draft: TrainedDraft) -> dict[str, Tensor]:
    rows = draft.shape.draft_vocab
    return {
        key: tensor[:rows] if key == "draft.lm_head.weight" else tensor
        for key, tensor in draft.stored.items()
    }


WIDE = {"ffn_hidden_size": 96, "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 16}
LAYOUTS = [
    pytest.param({}, id="one-layer"),
    pytest.param({"layers": 3}, id="three-layers"),
    pytest.param({"groups": 6}, id="multi-head"),
    pytest.param({"draft_vocab": 53, "padded_vocab": 64}, id="whole-vocabulary"),
    pytest.param({"dtype": torch.bfloat16, "aux_layers": (3, 7)}, id="bf16-two-captures"),
    pytest.param({"algorithm": "eagle3.1", "layers": 2}, id="eagle3.1-two-layers"),
    pytest.param({"norm_before_fc": True}, id="norm-before-fc"),
    pytest.param({"base": WIDE}, id="own-widths"),
]


EAGLE1 = {"algorithm": "eagle1", "draft_vocab": 53, "layers": 2}
RESIDUAL = {"norm_before_residual": True}
HEADS = {"qk_layernorm": True, "layers": 2, "algorithm": "eagle3.1"}
WIDE_MLA = {"num_attention_heads": 8, "q_lora_rank": 30, "qk_head_dim": 12}
MLA = {"mla": MLA_SIZES, "rope": {"rope_theta": 50000.0, "rope_scaling": DEEPSEEK_YARN}}
CASES = [
    *[
        pytest.param(*case.values, name, id=f"{case.id}-{name}")
        for case in LAYOUTS
        for name in FORMATS
    ],
    *[pytest.param(EAGLE1, name, id=f"eagle1-{name}") for name in ("vllm", "sglang")],
    *[pytest.param(MLA, name, id=f"mla-{name}") for name in ("hf", "vllm", "sglang", "trtllm")],
    pytest.param({**MLA, "layers": 2, **RESIDUAL}, "vllm", id="mla-two-layers-vllm"),
    pytest.param({**MLA, "base": WIDE_MLA}, "hf", id="mla-own-widths-hf"),
    *[pytest.param(RESIDUAL, name, id=f"residual-{name}") for name in ("vllm", "speculators")],
    *[pytest.param(HEADS, name, id=f"qk-norm-{name}") for name in ("vllm", "speculators")],
]


@pytest.mark.parametrize(("changes", "layout"), CASES)
def test_import_of_an_export_is_bit_equal(
    tmp_path: Path, changes: dict[str, Any], layout: str
) -> None:
    draft, directory = exported(tmp_path, layout, **changes)
    stored = imported(directory, draft)
    write_draft_checkpoint(stored, tmp_path / "back")
    checkpoint = CheckpointReader.open(tmp_path / "back")
    expected = expected_tensors(draft)
    assert set(checkpoint.keys()) == {*expected, "draft.metadata"}
    found = checkpoint.load(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].equal(tensor), key
    info = read_info(checkpoint)
    captured = draft.shape.aux_layers if info.spec.algorithm != "eagle1" else ()
    assert info.aux_layers == captured and info.num_layers == draft.shape.layers
    assert info.layer_args["ffn_hidden_size"] == 14 and info.layer_args["kv_channels"] == 10
    for name in ("algorithm", "norm_before_fc", "norm_before_residual", "qk_layernorm"):
        assert getattr(info.spec, name) == getattr(draft.shape, name), name
    assert info.base == base_of(draft) and info.draft_vocab_size == draft.shape.draft_vocab
    again = open_checkpoint_draft(tmp_path / "back")
    assert all(again.tensors[key]().equal(found[key]) for key in again.tensors)
    export_draft(tmp_path / "back", tmp_path / "twice", fmt=FORMATS[layout])
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("hf", "twice"))
    assert set(first) == set(second) and all(first[k].equal(second[k]) for k in first)


def safeailab(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Its own embedding, no captured layers, the base's architecture name."""
    for name in ("eagle_config", "eagle_aux_hidden_state_layer_ids", "num_aux_hidden_states",
                 "rope_parameters"):  # fmt: skip
        del config[name]
    config["architectures"] = ["LlamaForCausalLM"]
    tensors["embed_tokens.weight"] = torch.zeros(53, 24)


def specforge(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Captured layers inside eagle_config alone, t2d and d2t as buffers."""
    del config["eagle_aux_hidden_state_layer_ids"], config["num_aux_hidden_states"]
    config["architectures"] = ["LlamaForCausalLMEagle3"]


def modelopt(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """layers.0, d2t of 32 bits, no t2d, and its own bookkeeping in eagle_config."""
    del config["eagle_aux_hidden_state_layer_ids"]
    config["eagle_config"] |= {"next_layer_regular": True, "eh_proj_before_attn": False}
    for name in [name for name in tensors if name.startswith("midlayer.")]:
        tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)
    tensors["d2t"] = tensors["d2t"].int()
    del tensors["t2d"]


def vllm(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Captured layers at the top level alone: states after so many layers."""
    del config["eagle_config"]
    config["architectures"] = ["Eagle3LlamaForCausalLM"]


def unsorted(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The vocabulary by frequency instead of by id."""
    order = torch.randperm(19)
    rows = torch.arange(19)
    tensors["d2t"] = (tensors["d2t"] + rows)[order] - rows
    tensors["lm_head.weight"] = tensors["lm_head.weight"][order]


WRITERS = [safeailab, specforge, modelopt, vllm, unsorted]


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("writer", WRITERS)
def test_files_of_other_writers_are_understood(tmp_path: Path, writer: Any, pickled: bool) -> None:
    draft, directory = exported(tmp_path)
    _, tensors = rewrite(directory, writer)
    if pickled:
        torch.save(tensors, directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
    needs = draft.shape.aux_layers if writer is safeailab else None
    stored = imported(directory, draft, aux_layers=needs)
    assert stored.info.aux_layers == draft.shape.aux_layers
    found = {key: load() for key, load in stored.tensors.items()}
    found["draft.vocab_ids"] = stored.vocab_ids
    for key, tensor in expected_tensors(draft).items():
        assert found[key].equal(tensor), key


def test_an_eagle1_draft_of_safeailab_is_understood(tmp_path: Path) -> None:
    """The base's architecture name, its head and embedding beside; a bias only if it is zero."""
    draft, directory = exported(tmp_path, "sglang", **EAGLE1)

    def original(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["architectures"] = ["LlamaForCausalLM"]
        config["bias"] = True
        tensors["lm_head.weight"] = torch.ones(53, 24)
        tensors["embed_tokens.weight"] = torch.ones(53, 24)

    rewrite(directory, original)
    stored = imported(directory, draft)
    assert stored.info.spec.algorithm == "eagle1" and stored.info.aux_layers == ()
    assert stored.tensors["draft.fc.weight"]().equal(draft.hf["fc.weight"])
    rewrite(directory, lambda config, tensors: tensors["fc.bias"].fill_(1.0))
    with pytest.raises(ValueError, match=r"fc.bias is not zero"):
        imported(directory, draft)
    with pytest.raises(ValueError, match="reads no aux layers"):
        imported(directory, draft, aux_layers=(1, 2, 3))


def test_aux_layers_default_to_those_of_training(tmp_path: Path) -> None:
    draft, directory = exported(tmp_path)
    rewrite(directory, safeailab)
    assert imported(directory, draft).info.aux_layers == (1, 4, 7)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def test_a_moe_draft_is_neither_converted_nor_a_warm_start(tmp_path: Path) -> None:
    draft = TrainedDraft.make()
    draft.metadata["spec"]["num_experts"] = 4
    draft.save(tmp_path / "ckpt")
    with pytest.raises(ValueError, match="a MoE draft cannot be converted: no server's EAGLE"):
        export_draft(tmp_path / "ckpt", tmp_path / "hf")
    with pytest.raises(ValueError, match="a MoE draft is no warm start; load resumes"):
        open_checkpoint_draft(tmp_path / "ckpt")


@pytest.mark.parametrize("mla", [False, True])
def test_the_rope_is_that_of_a_draft_of_this_base(tmp_path: Path, mla: bool) -> None:
    """Beside latent attention a draft has plain angles, whatever the base's scaling; a theta that
    the base's config.json leaves to its family's default counts too."""
    draft = TrainedDraft.make(rope={"rope_scaling": YARN})
    if mla:
        draft.metadata["base"]["megatron_args"] |= {
            "multi_latent_attention": True, "kv_lora_rank": 8, "qk_head_dim": 6,
            "qk_pos_emb_head_dim": 4, "v_head_dim": 6,
        }  # fmt: skip
    draft.save(tmp_path / "ckpt")
    export_draft(tmp_path / "ckpt", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert ("rope_scaling" in config) != mla and config["rope_theta"] == 50000.0
    assert imported(tmp_path / "hf", draft).info.base == base_of(draft)


def test_a_rope_of_its_own_is_adapted_on_demand(tmp_path: Path) -> None:
    draft, directory = exported(tmp_path)

    def other_rope(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 10000.0
        config["rms_norm_eps"] = 1e-6

    rewrite(directory, other_rope)
    with pytest.raises(ValueError, match=r"rotary embedding .* is not the base's .*adapt"):
        imported(directory, draft)
    assert imported(directory, draft, adapt=True).info.base == base_of(draft)


@pytest.mark.parametrize(
    ("dtype", "factor", "refused"),
    [(torch.float32, 1.0, False), (torch.bfloat16, 1.0, False), (torch.float32, 1.02, True)],
)
def test_an_embedding_beside_the_draft_must_be_the_bases(
    tmp_path: Path, dtype: torch.dtype, factor: float, refused: bool
) -> None:
    """Up to rounding; a base that is not there is not asked."""
    draft, directory = exported(tmp_path)
    embedding = torch.randn(53, 24)
    rows = [(0, 20), (20, 53)]
    chunks = [
        Chunk("embedding.word_embeddings.weight", (53, 24), (a, 0), (b - a, 24), torch.float32,
              partial(embedding.__getitem__, slice(a, b)))
        for a, b in rows
    ]  # fmt: skip
    write_torch_dist(tmp_path / "base" / "release", chunks, {}, {})
    (tmp_path / "base" / TRACKER_NAME).write_text("release")

    def with_embedding(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = (factor * embedding).to(dtype)

    rewrite(directory, with_embedding)
    assert imported(directory, draft).info.base == base_of(draft)
    where = {"base_directory": tmp_path / "base"}
    if refused:
        with pytest.raises(ValueError, match=r"model.embed_tokens.weight is not the embedding of"):
            imported(directory, draft, **where)
    assert imported(directory, draft, adapt=refused, **where).info.base == base_of(draft)


def test_the_command_imports_a_draft(tmp_path: Path) -> None:
    draft, directory = exported(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / BASE_JSON_NAME).write_text(json.dumps(draft.metadata["base"]))
    command = [sys.executable, "tools/import_draft.py", "--hf", str(directory)]
    command += ["--base", str(tmp_path / "base"), "--save", str(tmp_path / "back")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert (runs[0].returncode, runs[0].stderr) == (0, "")
    assert "reading layers 1 4 7 of 'tiny-base', 19 of 53 token ids" in runs[0].stdout
    assert runs[1].returncode == 2 and runs[1].stderr.startswith("error: --save ")
    assert runs[1].stderr.count("\n") == 1
