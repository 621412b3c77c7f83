"""The real draft module, saved by Megatron from several ranks, converts to the reference's weights.

Covers what a hand-made checkpoint cannot: Megatron's own keys, its cut of gate/up and of query
groups over tensor-parallel ranks, and the padding of the vocabulary in each layout.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eagle.hf.draft.export import export_draft
from megatron_eagle.hf.draft.formats import FORMATS
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.draft_fixture import Case, build_model
from tests.helpers.reference_case import MLA, make_case
from tests.helpers.reference_metadata import metadata_of
from tests.helpers.trained_draft import metadata_tensor
from tests.reference.eagle3 import ReferenceEagle3


def save_case(rank: int, world: int, case: Case, metadata: torch.Tensor, directory: str) -> None:
    megatron_parallel(tp=world)
    from megatron.core import dist_checkpointing

    model = build_model(case)
    model.draft.metadata.copy_(metadata)
    dist_checkpointing.save(model.sharded_state_dict(), directory)
    assert not multiprocessing.active_children(), "a synchronous save needs no process"


EAGLE31 = {"fc_norm": True, "norm_output": True}
CASES = [
    pytest.param(1, {}, id="tp1"),
    pytest.param(2, {"num_layers": 3}, id="tp2-three-layers"),
    pytest.param(2, {"sequence_parallel": True, "num_layers": 2}, id="tp2-sp-two-layers"),
    pytest.param(2, {"draft_vocab_size": 61}, id="tp2-whole-vocabulary"),
    pytest.param(4, {"draft_vocab_size": 5}, id="tp4-empty-shard"),
    pytest.param(2, {**EAGLE31, "num_layers": 2}, id="tp2-eagle3.1-two-layers"),
    pytest.param(2, {**EAGLE31, "sequence_parallel": True}, id="tp2-sp-eagle3.1"),
    pytest.param(2, {"norm_before_fc": True, "norm_before_residual": True}, id="tp2-norms"),
    pytest.param(2, {**MLA, "num_layers": 2}, id="tp2-mla-two-layers"),
    pytest.param(
        2,
        {**MLA, **EAGLE31, "sequence_parallel": True},
        id="tp2-sp-mla",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("world", "changes"), CASES)
def test_exported_equals_reference(tmp_path: Path, world: int, changes: dict[str, Any]) -> None:
    case, reference = make_case(**changes)
    iteration = tmp_path / "ckpt" / "iter_0000007"
    iteration.mkdir(parents=True)
    (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").write_text("7")
    metadata = metadata_tensor(metadata_of(case.config))
    run_distributed(save_case, world, case, metadata, str(iteration))
    several_mla = case.config.kv_lora_rank and case.config.num_layers > 1
    layout = "vllm" if case.config.norm_before_residual or several_mla else "hf"
    export_draft(tmp_path / "ckpt", tmp_path / "hf", fmt=FORMATS[layout])
    exported = ReferenceEagle3.from_hf(tmp_path / "hf", case.embedding)
    assert exported.vocab_ids.equal(case.vocab_ids)
    weights = dict(exported.named_parameters())
    assert set(weights) == set(case.weights)
    for name, expected in case.weights.items():
        assert weights[name].equal(expected), name
    base_logits = case.final_hidden @ case.output_weight.t()
    inputs = (case.aux, case.tokens, base_logits, case.loss_mask)
    assert exported.forward_ttt(*inputs)["loss"].equal(reference.forward_ttt(*inputs)["loss"])
