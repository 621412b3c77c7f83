"""A draft saved by pipeline stages, context- or expert-parallel ranks converts to its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.hf.draft.export import export_draft
from megatron_eagle.testing.harness import run_distributed
from tests.helpers.pipeline_case import LAYERS, make_case
from tests.helpers.pipeline_fixture import PipelineCase, build_pipeline
from tests.helpers.reference_metadata import metadata_of
from tests.helpers.tiny_hf import make_base
from tests.helpers.trained_draft import metadata_tensor
from tests.reference.eagle3 import ReferenceEagle3

EXPERTS = {
    "num_experts": 4, "moe_ffn_hidden_size": 24, "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    make_base(folder / "untied_hf", "llama", num_hidden_layers=LAYERS, tie_word_embeddings=False)
    import_base(folder / "untied_hf", folder / "untied")
    return folder


def save_draft(
    rank: int, world: int, case: PipelineCase, metadata: torch.Tensor, directory: str
) -> None:
    """As training saves its model."""
    model, _, _ = build_pipeline(case, **(EXPERTS if case.ep > 1 else {}))
    from megatron.core import dist_checkpointing

    model.module.draft.metadata.copy_(metadata)
    dist_checkpointing.save(model.module.sharded_state_dict(), directory)


LAYOUTS = [
    pytest.param(2, {"pp": 2, "first": 3}, id="pp2"),
    pytest.param(2, {"ep": 2}, id="ep2"),
    pytest.param(2, {"cp": 2}, id="cp2", marks=pytest.mark.slow),
    pytest.param(
        4, {"tp": 2, "sequence_parallel": True, "pp": 2, "first": 3}, id="tp2-sp-pp2",
        marks=pytest.mark.slow,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_exported_is_what_the_ranks_held(
    world: int, layout: dict[str, Any], bases: Path, tmp_path: Path
) -> None:
    case = make_case(bases, "untied", 0, 1, **layout)
    iteration = tmp_path / "ckpt" / "iter_0000007"
    iteration.mkdir(parents=True)
    (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").write_text("7")
    metadata = metadata_tensor(metadata_of(case.draft.config))
    run_distributed(save_draft, world, case, metadata, str(iteration))
    export_draft(tmp_path / "ckpt", tmp_path / "hf")
    exported = ReferenceEagle3.from_hf(tmp_path / "hf", case.draft.embedding)
    assert exported.vocab_ids.equal(case.draft.vocab_ids)
    weights = dict(exported.named_parameters())
    assert set(weights) == set(case.draft.weights)
    for name, expected in case.draft.weights.items():
        assert weights[name].equal(expected), name
