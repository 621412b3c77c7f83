"""The model card's paragraphs on llama.cpp and OpenVINO, whose converters count layers differently.

``make test-servers`` runs these very commands in the engines.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_eagle.config import DraftSpec
from megatron_eagle.hf.draft.commands import converter_paragraphs
from megatron_eagle.hf.draft.export import export_draft
from megatron_eagle.hf.draft.formats import FORMATS
from megatron_eagle.hf.draft.info import DraftInfo
from tests.helpers.exported_draft import base_of
from tests.helpers.trained_draft import TrainedDraft
from tests.helpers.trained_mla import MLA_SIZES

LLAMACPP, OPENVINO = "llama.cpp, by its own converter", "OpenVINO GenAI, by optimum-intel"


def card(folder: Path, fmt: str, **changes: Any) -> str:
    TrainedDraft.make(**changes).save(folder / "ckpt")
    export_draft(folder / "ckpt", folder / "out", fmt=FORMATS[fmt])
    return (folder / "out" / "README.md").read_text()


def commands(text: str, engine: str) -> list[str]:
    """The indented lines of the paragraph under the words ``engine``, continued ones joined."""
    paragraph = text.split(engine)[1].split("\n\n")[1].replace("\\\n", " ")
    return [" ".join(line.split()) for line in paragraph.splitlines()]


@pytest.mark.parametrize("fmt", ["hf", "vllm"])
@pytest.mark.parametrize("layers", [(1, 4, 7), (0, 3, 8)])
def test_each_converter_is_told_the_draft_s_layers(
    tmp_path: Path, fmt: str, layers: tuple[int, ...]
) -> None:
    text = card(tmp_path, fmt, aux_layers=layers)
    assert commands(text, LLAMACPP) == [
        "python convert_hf_to_gguf.py BASE --outfile base.gguf",
        "python convert_hf_to_gguf.py DRAFT --target-model-dir BASE --outfile draft.gguf",
        "llama-server -m base.gguf -md draft.gguf --spec-type draft-eagle3 "
        "--spec-draft-n-max 4 --spec-draft-p-min 0",
    ]
    # Its converter reads the ids at the top level: inputs of layers.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [i + 1 for i in layers]
    *convert, edit = commands(text, OPENVINO)
    assert convert == [
        "optimum-cli export openvino -m BASE --task text-generation-with-past OV_BASE",
        "optimum-cli export openvino -m DRAFT --task text-generation-with-past "
        "--trust-remote-code OV_DRAFT",
    ]
    # OpenVINO takes outputs of layers, which the exported file does not say until it is edited.
    (tmp_path / "OV_DRAFT").mkdir()
    file = tmp_path / "OV_DRAFT" / "openvino_model.xml"
    file.write_text('<net>\n<rt_info>\n<eagle3_mode value="True" />\n</rt_info>\n</net>\n')
    subprocess.run(edit, shell=True, cwd=tmp_path, check=True)
    (info,) = ElementTree.parse(file).getroot().iter("rt_info")
    assert [child.tag for child in info] == ["eagle3_mode", "hidden_layers_list"]
    assert info[1].get("value") == " ".join(map(str, layers))


def engines_of(fmt: str, **changes: Any) -> list[str]:
    """The engines that the card has a paragraph on, beside the servers of the format."""
    draft = TrainedDraft.make(**changes)
    spec = DraftSpec.from_mapping(draft.metadata["spec"])
    text = "\n".join(converter_paragraphs(FORMATS[fmt], DraftInfo(spec, base_of(draft), 3)))
    return [engine for engine in (LLAMACPP, OPENVINO) if engine in text]


@pytest.mark.parametrize(
    ("fmt", "changes", "engines"),
    [
        ("hf", {}, [LLAMACPP, OPENVINO]),
        ("hf", {"draft_vocab": 53, "padded_vocab": 64}, [LLAMACPP, OPENVINO]),
        ("vllm", {"norm_before_fc": True}, [LLAMACPP]),
        ("vllm", {"norm_before_residual": True}, [LLAMACPP]),
        ("vllm", {"qk_layernorm": True}, []),
        ("hf", {"layers": 2}, []),
        ("hf", {"aux_layers": (1, 4)}, []),
        ("hf", {"aux_layers": (1, 3, 5, 7)}, []),
        ("hf", {"mla": MLA_SIZES}, []),
        ("vllm", {"algorithm": "eagle3.1"}, []),
        ("vllm", {"algorithm": "eagle1", "draft_vocab": 53}, []),
        ("vllm", {"algorithm": "p-eagle", "mask_token": 4}, []),
        # Other names of files' tensors and fields than these converters read.
        ("sglang", {}, []),
        ("trtllm", {}, []),
        ("speculators", {}, []),
    ],
)
def test_an_engine_that_lacks_the_draft_is_left_out(
    fmt: str, changes: dict[str, Any], engines: list[str]
) -> None:
    assert engines_of(fmt, **changes) == engines


def test_vllm_s_cpu_package_starts_by_a_module(tmp_path: Path) -> None:
    text = card(tmp_path, "hf")
    assert "`python -m vllm.entrypoints.openai.api_server --model BASE` stands for" in text
