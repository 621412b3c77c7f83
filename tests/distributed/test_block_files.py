"""Block drafts of other projects, imported, checked in Megatron's modules, and exported again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eagle.checkpoint.directory import load_base_json
from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.import_hf import open_hf_draft
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.block_files import (
    AUX_LAYERS,
    FORMAT,
    VARIANTS,
    checkpoint_of,
    export,
    make_draft,
    make_files_base,
    tensors_of,
    write_files,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files_base(tmp_path_factory.mktemp("base"))


def verify(rank: int, world: int, pairs: list[tuple[Path, Path]]) -> list[float | str]:
    groups = megatron_parallel()
    from megatron_eagle.decode.load import read_draft
    from megatron_eagle.decode.verify import check_export

    found: list[float | str] = []
    for checkpoint, exported in pairs:
        try:
            about = read_draft(checkpoint, "--load")
            found.append(check_export(about, checkpoint, exported, groups))
        except ValueError as error:
            found.append(str(error))
    return found


def test_there_and_back(base: Path, tmp_path: Path) -> None:
    """Every tensor comes back as it was, and the files give what Megatron's modules give; one
    tensor changed is seen."""
    pairs = []
    for name in VARIANTS:
        folder = tmp_path / name
        folder.mkdir()
        case = make_draft(base, name)
        checkpoint = checkpoint_of(case, base, folder)
        exported = export(checkpoint, folder / "hf", FORMAT.get(name, "hf"))
        found, expected = load_file(exported / "model.safetensors"), tensors_of(case)
        assert set(found) - {"t2d"} == set(expected), name
        for key, tensor in expected.items():
            assert found[key].equal(tensor), (name, key)
        config = json.loads((exported / "config.json").read_text())
        assert config["dflash_config"]["target_layer_ids"] == list(AUX_LAYERS)
        pairs.append((checkpoint, exported))
    for key in ("layers.1.self_attn.k_norm.weight", "markov_head.joint_proj.bias"):
        checkpoint, exported = pairs[-1]
        wrong = exported.parent / key
        wrong.mkdir()
        (wrong / "config.json").write_text((exported / "config.json").read_text())
        tensors = load_file(exported / "model.safetensors")
        tensors[key] = tensors[key].roll(1, 0)
        save_file(tensors, wrong / "model.safetensors")
        pairs.append((checkpoint, wrong))
    (found,) = run_distributed(verify, 1, pairs)
    for difference in found[: len(VARIANTS)]:
        assert isinstance(difference, float), difference
    for refusal in found[len(VARIANTS) :]:
        assert str(refusal).startswith("verify: the exported files give")


def test_the_speculators_format_comes_back(base: Path, tmp_path: Path) -> None:
    for name in ("dflash", "vanilla-compressed"):
        (tmp_path / name).mkdir()
        case = make_draft(base, name)
        exported = export(
            checkpoint_of(case, base, tmp_path / name), tmp_path / name / "hf", "speculators"
        )
        config = json.loads((exported / "config.json").read_text())
        assert config["aux_hidden_state_layer_ids"] == [i + 1 for i in AUX_LAYERS]
        assert config["sliding_window_non_causal"] is True
        assert config["sample_from_anchor"] is (name != "dflash")
        stored = open_hf_draft(exported, load_base_json(base), base_directory=base)
        assert stored.info.aux_layers == AUX_LAYERS
        for key, load in stored.tensors.items():
            assert load().isfinite().all(), key


REFUSED: list[tuple[str, str, str]] = [
    ("dflash-compressed", "sglang", "SGLang has no vocabulary map for block drafts"),
    ("dflash-compressed", "hf", "SGLang has no vocabulary map for block drafts.*use format vllm"),
    ("dflash", "trtllm", "TensorRT-LLM does not load block drafts"),
    ("gated", "vllm", "vLLM knows no <markov_head> gated, only vanilla; use <format> sglang"),
    ("rnn", "speculators", "vLLM knows no <markov_head> rnn, only vanilla"),
]


@pytest.mark.parametrize(("name", "fmt", "reason"), REFUSED)
def test_what_a_server_would_run_wrongly_is_refused(
    name: str, fmt: str, reason: str, base: Path, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(make_draft(base, name), base, tmp_path)
    with pytest.raises(UserError, match=reason.replace("<", ".?").replace(">", ".?")):
        export(checkpoint, tmp_path / "hf", fmt)


FOREIGN: list[tuple[str, dict[str, Any], str]] = [
    ("dflash", {"block_size": None}, "block_size is missing|block_size must be"),
    ("dflash", {"layer_types": ["sliding_attention"] * 2}, "sliding window"),
    ("dflash", {"attention_bias": True}, "attention_bias = True"),
    ("dflash", {"is_causal": True}, "a causal block"),
    ("dflash", {"sample_from_anchor": True}, "sample_from_anchor = True"),
    ("dflash", {"dflash_config": {"target_layer_ids": [1, 3, 5]}}, "mask_token_id must be"),
    (
        "dflash",
        {"dflash_config": {"target_layer_ids": [1, 3, 7], "mask_token_id": 2}},
        "reads aux layer 7, the base",
    ),
    (
        "dflash",
        {"dflash_config": {"target_layer_ids": [1, 3, 5], "mask_token_id": 61}},
        "mask_token_id 61 is outside the base's 0 to 60",
    ),
    ("vanilla", {"sample_from_anchor": False}, "sample_from_anchor = False"),
    ("vanilla", {"confidence_head_with_markov": False}, "confidence_head_with_markov = False"),
    ("vanilla", {"markov_head_type": "lstm"}, "markov_head must be one of vanilla, gated, rnn"),
    ("vanilla", {"markov_rank": 5}, "markov_head.markov_w1.weight has shape"),
    ("vanilla", {"enable_confidence_head": False}, "confidence_head.proj.bias.* unknown in a"),
]


@pytest.mark.parametrize(("name", "changes", "reason"), FOREIGN)
def test_what_training_does_not_compute_is_refused(
    name: str, changes: dict[str, Any], reason: str, base: Path, tmp_path: Path
) -> None:
    files = write_files(make_draft(base, name), tmp_path / "foreign", **changes)
    with pytest.raises(UserError, match=reason):
        open_hf_draft(files, load_base_json(base), base_directory=base)


def test_a_head_or_mask_embedding_of_its_own_is_refused(base: Path, tmp_path: Path) -> None:
    case, info = make_draft(base, "dflash-compressed"), load_base_json(base)
    files = write_files(case, tmp_path / "foreign")
    tensors = load_file(files / "model.safetensors")
    tensors["lm_head.weight"][3] += 1.0
    save_file(tensors, files / "model.safetensors")
    with pytest.raises(UserError, match="weight is not the base's, which"):
        open_hf_draft(files, info, base_directory=base)
    open_hf_draft(files, info, base_directory=base, adapt=True)
    torch.save({"embedding": torch.zeros(4), "mask_token_id": 2}, files / "mask_embedding.pt")
    with pytest.raises(UserError, match="an embedding of its own for the mask token"):
        open_hf_draft(files, info, base_directory=base)
