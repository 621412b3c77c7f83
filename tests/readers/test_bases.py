"""Which bases vLLM and SGLang give states of, and which layers SGLang captures for which ids.

Read in, and for the ids run from, the servers' own files.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Optional  # noqa: UP035

import pytest

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.hf.base.families import FAMILIES
from megatron_eagle.hf.draft.servers import (
    COUNTS_FROM_FIRST,
    GIVES_LAST_OUTPUT,
    SERVERS,
    outputs_of_inner_ids,
    sglang_ids,
)
from tests.readers.server_classes import class_of, inherits, method_source

WHEELS = Path(os.environ.get("READERS_WHEELS", "absent"))
VLLM = WHEELS / "vllm" / "vllm" / "model_executor" / "models"
SGLANG = WHEELS / "sglang" / "sglang" / "srt" / "models"
if not VLLM.is_dir():
    pytest.skip("run by `make test-readers`", allow_module_level=True)
BASES = sorted({*FAMILIES, *COUNTS_FROM_FIRST})
LAYERS = 12
CAPTURE = "set_eagle3_layers_to_capture"


class Model(SimpleNamespace):
    """A base's model: some of SGLang's classes set the attribute, others call this."""

    def set_eagle3_layers_to_capture(self, layers: list[int]) -> None:
        self.layers_to_capture = layers


def captured_outputs(architecture: str, ids: list[int]) -> list[int]:
    """The layers whose outputs SGLang hands to a draft with these ids in ``eagle_config``."""
    source = method_source(SGLANG, architecture, CAPTURE)
    assert source is not None
    rank = SimpleNamespace(is_last_rank=True)
    names: dict[str, Any] = {
        "Optional": Optional,
        "List": List,  # noqa: UP006
        "get_parallel": lambda: SimpleNamespace(pp_group=rank),
    }
    exec(source, names)
    base = SimpleNamespace(
        pp_group=rank, config=SimpleNamespace(num_hidden_layers=LAYERS), model=Model()
    )
    names[CAPTURE](base, ids)
    return [layer - 1 for layer in base.model.layers_to_capture]


def base_of(architecture: str) -> BaseInfo:
    config = {"architectures": [architecture]}
    return BaseInfo("any", "base", "0", 64, config, {"num_layers": LAYERS})


BEFORE_ITS_NORM = {"MiMoForCausalLM"}
"""Bases of which vLLM gives the state before the final norm alone, whatever their classes say."""


@pytest.mark.parametrize("architecture", sorted(set(BASES) - BEFORE_ITS_NORM))
def test_vllm_gives_the_states_that_the_table_says(architecture: str) -> None:
    class_of(VLLM, architecture)
    aux = inherits(VLLM, architecture, "SupportsEagle3")
    assert aux == (architecture in (SERVERS["vllm"].aux_states or ()))
    assert architecture in (SERVERS["vllm"].final_state or ())  # its proposer asks for no class


INNER = {"Qwen3_5ForCausalLM"}
"""What SGLang has only inside a multimodal model's class, and does not serve by itself."""


@pytest.mark.parametrize("architecture", sorted(INNER))
def test_sglang_does_not_serve_an_inner_model(architecture: str) -> None:
    source = class_of(SGLANG, architecture)[0].read_text()
    assert architecture not in source.partition("EntryClass")[2]
    assert architecture not in (SERVERS["sglang"].aux_states or ())
    assert architecture not in (SERVERS["sglang"].final_state or ())


@pytest.mark.parametrize("architecture", sorted(set(BASES) - INNER))
def test_sglang_gives_the_states_that_the_table_says(architecture: str) -> None:
    class_of(SGLANG, architecture)
    aux = method_source(SGLANG, architecture, CAPTURE) is not None
    final = method_source(SGLANG, architecture, "get_embed_and_head") is not None
    assert aux == (architecture in (SERVERS["sglang"].aux_states or ()))
    assert final == (architecture in (SERVERS["sglang"].final_state or ()))


@pytest.mark.parametrize("outputs", [[1, 5, 8], [2, 5, 8], [0, 5, 8], [3, 7], [5, 10]])
@pytest.mark.parametrize("architecture", sorted(SERVERS["sglang"].aux_states or ()))
def test_sglang_captures_the_layers_that_its_ids_stand_for(
    architecture: str, outputs: list[int]
) -> None:
    base = base_of(architecture)
    ids = sglang_ids(base, outputs)
    if ids is not None:
        assert captured_outputs(architecture, ids) == outputs
    else:  # no ids do: neither convention says it
        assert outputs[0] == 0
        for shift in (0, 1):
            assert captured_outputs(architecture, [i + shift for i in outputs]) != outputs
    for given in (outputs, [i + 1 for i in outputs]):
        assert outputs_of_inner_ids(base, given) == captured_outputs(architecture, given)


@pytest.mark.parametrize("architecture", sorted(SERVERS["sglang"].aux_states or ()))
def test_sglang_hands_out_the_last_output_of_some_bases_only(architecture: str) -> None:
    """A model that does looks for ``end_layer`` behind its loop over the layers."""
    source = class_of(SGLANG, architecture)[0].read_text()
    looks_behind = "self.end_layer in self.layers_to_capture" in source
    assert looks_behind == (architecture in GIVES_LAST_OUTPUT)
