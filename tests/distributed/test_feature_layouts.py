"""Offline features do not depend on the layout that the base ran in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.random_answers import write_answers
from tests.helpers.tiny_hf import make_base

LENGTH = 40


def extracted(
    rank: int, world: int, base: str, answers: str, output: str, sizes: dict[str, int]
) -> None:
    """Write the features of ``answers`` in a layout of ``sizes``."""
    groups = megatron_parallel(**sizes)
    from megatron_eagle.checkpoint.directory import load_base_json
    from megatron_eagle.data.documents import FittedDocuments, open_documents
    from megatron_eagle.data.features.base_rows import BaseRows
    from megatron_eagle.data.features.extract import Replica, begin, extract, finish, plan_features
    from megatron_eagle.decode.load import load_base
    from megatron_eagle.pipeline.exchange import StageExchange

    info = load_base_json(base)
    frozen = load_base(base, info, groups, (0, 2))
    documents = FittedDocuments(open_documents(answers, info.vocab_size), LENGTH)
    exchange = StageExchange.of(frozen, groups.pp)
    plan, total = plan_features(exchange, info, documents, answers, "float32", 40_000)
    assert len(plan.shards) % 2 == 1 and len(plan.shards) > 2, "replicas have unequal shares"
    if rank == 0:
        begin(plan, Path(output), total, len)
    torch.distributed.barrier()
    replica = Replica(groups.dp.rank(), groups.dp.size(), groups.ep.size() > 1)
    extract(BaseRows(exchange), documents, plan, Path(output), replica, len)
    torch.distributed.barrier()
    if rank == 0:
        finish(Path(output))


LAYOUTS = [
    pytest.param("llama", 2, {}, True, id="dp2"),
    pytest.param("llama", 2, {"pp": 2}, True, id="pp2"),
    pytest.param("llama", 4, {"pp": 4}, True, id="pp4", marks=pytest.mark.slow),
    pytest.param("llama", 2, {"tp": 2}, False, id="tp2"),
    pytest.param("llama", 2, {"cp": 2}, False, id="cp2"),
    pytest.param(
        "mistral", 4, {"pp": 2, "cp": 2}, False, id="pp2-cp2-window", marks=pytest.mark.slow
    ),
    pytest.param("mixtral", 2, {"ep": 2}, False, id="ep2"),
    pytest.param("mixtral", 4, {"ep": 2, "pp": 2}, False, id="ep2-pp2", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", 2, {"tp": 2}, False, id="mla-tp2"),
]


@pytest.mark.parametrize(("family", "world", "sizes", "exact"), LAYOUTS)
def test_features_are_those_of_one_process(
    tmp_path: Path, family: str, world: int, sizes: dict[str, int], exact: bool
) -> None:
    make_base(tmp_path / "hf", family, num_hidden_layers=4)
    import_base(tmp_path / "hf", tmp_path / "base")
    write_answers(tmp_path / "answers.jsonl", 30)
    inputs = (str(tmp_path / "base"), str(tmp_path / "answers.jsonl"))
    run_distributed(extracted, 1, *inputs, str(tmp_path / "alone"), {})
    run_distributed(extracted, world, *inputs, str(tmp_path / "cut"), sizes)
    alone, cut = (sorted((tmp_path / name).iterdir()) for name in ("alone", "cut"))
    assert [file.name for file in alone] == [file.name for file in cut]
    compared = 0
    for one, other in zip(alone, cut, strict=True):
        if one.suffix != ".bin":
            continue
        if exact:
            assert one.read_bytes() == other.read_bytes(), one.name
        found, expected = (np.fromfile(file, np.float32) for file in (other, one))
        # Products over half of the rows round otherwise, by the size of the whole residual.
        bound = 5e-6 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=one.name)
        compared += found.size
    plans = [json.loads((tmp_path / name / "index.json").read_text()) for name in ("alone", "cut")]
    sizes_of_layers: list[Any] = [plan.pop("layer_sizes") for plan in plans]
    assert plans[0] == plans[1] and compared > 10_000
    assert sizes_of_layers[1] == pytest.approx(sizes_of_layers[0], rel=1e-5)
