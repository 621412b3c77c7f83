"""What servers do with a base: the tables, the ids of aux layers, the warnings, the documents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.config import DraftSpec
from megatron_eagle.hf.base.families import FAMILIES
from megatron_eagle.hf.base.import_base import import_base, model_name
from megatron_eagle.hf.draft.export import export_draft
from megatron_eagle.hf.draft.formats import FORMATS, format_notes, servers_of
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.draft.servers import (
    COUNTS_FROM_FIRST,
    SERVERS,
    outputs_of_inner_ids,
    serving_notes,
    sglang_ids,
)
from tests.helpers.exported_draft import base_of, imported
from tests.helpers.tiny_hf import make_base
from tests.helpers.trained_draft import TrainedDraft
from tools import serving_table

ROOT = Path(__file__).resolve().parents[2]
DEEPSEEK = "DeepseekV3ForCausalLM"


def draft_of(architecture: str, **changes: Any) -> TrainedDraft:
    draft = TrainedDraft.make(**changes)
    draft.metadata["base"]["hf_config"]["architectures"] = [architecture]
    return draft


def info_of(architecture: str, **changes: Any) -> DraftInfo:
    draft = draft_of(architecture, **changes)
    return DraftInfo(DraftSpec.from_mapping(draft.metadata["spec"]), base_of(draft), 3)


def written(folder: Path, fmt: str) -> tuple[Any, Any, str]:
    export_draft(folder / "ckpt", folder / fmt, fmt=FORMATS[fmt])
    config = json.loads((folder / fmt / "config.json").read_text())
    name = "eagle_aux_hidden_state_layer_ids"
    card = (folder / fmt / "README.md").read_text()
    return config["eagle_config"][name], config[name], card


@pytest.mark.parametrize("architecture", sorted(COUNTS_FROM_FIRST))
def test_sglang_gets_the_ids_that_make_it_capture_the_draft_s_layers(
    tmp_path: Path, architecture: str
) -> None:
    """`make test-readers` runs SGLang's own method on the same ids."""
    draft = draft_of(architecture, aux_layers=(2, 4, 6))
    draft.save(tmp_path / "ckpt")
    inner, outer, card = written(tmp_path, "sglang")
    assert inner == outer == [3, 5, 7] and "sglang.launch_server" in card
    assert imported(tmp_path / "sglang", draft).info.aux_layers == (2, 4, 6)
    inner, outer, card = written(tmp_path, "hf")
    assert (inner, outer) == ([2, 4, 6], [3, 5, 7])
    assert "sglang.launch_server" not in card and "needs a directory of format sglang" in card
    assert imported(tmp_path / "hf", draft).info.aux_layers == (2, 4, 6)


@pytest.mark.parametrize("architecture", [DEEPSEEK, "LlamaForCausalLM"])
@pytest.mark.parametrize("fmt", ["hf", "sglang"])
def test_the_default_layers_are_the_same_for_every_server(
    tmp_path: Path, fmt: str, architecture: str
) -> None:
    draft_of(architecture).save(tmp_path / "ckpt")
    inner, outer, card = written(tmp_path, fmt)
    assert (inner, outer) == ([1, 4, 7], [2, 5, 8]) and "sglang.launch_server" in card


@pytest.mark.parametrize(
    ("architecture", "layers", "words"),
    [
        (DEEPSEEK, (0, 4, 6), "cannot be told to capture the output of layer 0 first"),
        ("LlamaForCausalLM", (1, 10), "never captures the output of a base's last layer, 10 here"),
    ],
)
def test_layers_that_sglang_cannot_capture_are_refused_there(
    tmp_path: Path, architecture: str, layers: tuple[int, ...], words: str
) -> None:
    draft_of(architecture, aux_layers=layers).save(tmp_path / "ckpt")
    with pytest.raises(ValueError, match=f"^format sglang: SGLang 0.5.23 {words}.*; use format hf"):
        written(tmp_path, "sglang")
    _, _, card = written(tmp_path, "hf")
    assert "sglang.launch_server" not in card and words in card and "vllm serve" in card


def test_ids_go_both_ways() -> None:
    for architecture in FAMILIES:
        base = info_of(architecture).base
        for outputs in ([1, 4, 6], [2, 5], [0, 3], [6]):
            ids = sglang_ids(base, outputs)
            assert ids is None or outputs_of_inner_ids(base, ids) == outputs


def test_notes_name_the_server_and_the_base() -> None:
    mixtral = info_of("MixtralForCausalLM", aux_layers=(1, 4, 6))
    notes = format_notes(FORMATS["hf"], mixtral)
    states = "gives a draft no auxiliary hidden states of a MixtralForCausalLM base"
    assert notes == [f"vLLM 0.33.0 {states}", f"SGLang 0.5.23 {states}"]
    assert servers_of(FORMATS["hf"], mixtral)[0] == ("trtllm",)
    assert serving_notes(info_of("LlamaForCausalLM", aux_layers=(1, 4, 6))) == []
    eagle1 = info_of("MixtralForCausalLM", algorithm="eagle1", draft_vocab=53)
    assert serving_notes(eagle1) == [
        "SGLang 0.5.23 gives a draft no final hidden state of a MixtralForCausalLM base"
    ]
    p_eagle = info_of("LlamaForCausalLM", algorithm="p-eagle", mask_token=4, aux_layers=(1, 4))
    (note,) = serving_notes(p_eagle, ("vllm",))
    assert "first model runner alone" in note
    unknown = replace(mixtral, base=replace(mixtral.base, hf_config={}))
    assert serving_notes(unknown) == []


def test_a_yarn_draft_reaches_as_far_as_its_rope(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    draft = draft_of("LlamaForCausalLM", rope={"rope_theta": 50000.0, "rope_scaling": yarn})
    draft.save(tmp_path / "ckpt")
    _, _, card = written(tmp_path, "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["max_position_embeddings"] == 8192 and "rope of type yarn" in card


def test_the_documents_have_the_table_of_the_code() -> None:
    page = (ROOT / serving_table.PAGE).read_text()
    assert serving_table.with_table(page) == page, "run `make docs`"
    table = serving_table.table()
    assert table.count("\n") == len(FAMILIES) + 2
    for server in SERVERS.values():
        assert server.release in table


def test_a_base_is_called_what_its_users_type(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--ORG--NAME-1.5--x" / "snapshots" / "0123abcd"
    make_base(snapshot, "llama")
    assert model_name(snapshot) == "ORG/NAME-1.5--x"
    assert import_base(snapshot, tmp_path / "base").name == "ORG/NAME-1.5--x"
    assert model_name(tmp_path / "folder") == str((tmp_path / "folder").resolve())
    (snapshot / "generation_config.json").write_text('{"eos_token_id": [5, 2], "top_k": 20}')
    base: BaseInfo = import_base(snapshot, tmp_path / "named", name="some/base")
    assert base.name == "some/base"
    assert {5, 2} <= set(base.hf_config["eos_token_id"])


def test_an_export_can_call_the_base_otherwise(tmp_path: Path) -> None:
    TrainedDraft.make().save(tmp_path / "ckpt")
    export_draft(
        tmp_path / "ckpt",
        tmp_path / "out",
        fmt=FORMATS["speculators"],
        base_name="ORG/NAME",
        base_note="padded files in PATH",
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "ORG/NAME"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| base | ORG/NAME (llama) |\n| serve beside | padded files in PATH |" in card
