"""A draft attached to a model in memory learns what the reference learns, in every layout, and the
model does not notice."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_eagle.objective.metrics import MetricSums
from megatron_eagle.testing.harness import run_distributed
from tests.helpers.attached_case import AttachedCase
from tests.helpers.attached_reference import expected_of, reference_of
from tests.helpers.attached_run import run_attached
from tests.helpers.reference_case import close

CASES = {
    "tp2": AttachedCase(tp=2),
    "tp2-sp-gpt2-eagle3.1": AttachedCase(
        base="gpt2", tp=2, sequence_parallel=True, spec={"algorithm": "eagle3.1"}
    ),
    "dp2-mtp-p-eagle": AttachedCase(
        base="mtp",
        spec={"algorithm": "p-eagle", "mask_token": 7},
        train={"ttt_steps": 2},
        fmt="vllm",
    ),
    "cp2": AttachedCase(cp=2, train={"loss": "tv"}),
    "cp2-documents": AttachedCase(cp=2, documents=True),
    "tp2-eagle1": AttachedCase(tp=2, spec={"algorithm": "eagle1"}, draft_vocab=None, fmt="sglang"),
    "tp2-sp-hybrid": AttachedCase(base="hybrid", tp=2, sequence_parallel=True),
    "ep2-moe": AttachedCase(base="moe", ep=2, draft_vocab=None),
}


def run_all(rank: int, world: int, folder: str) -> dict[str, Any]:
    return {name: run_attached(rank, world, case, folder) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed(run_all, 2, str(tmp_path_factory.mktemp("bases")))


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(results: list[dict[str, Any]], name: str) -> None:
    case = CASES[name]
    for rank, result in enumerate(r[name] for r in results):
        reference = reference_of(case, result)
        expected = expected_of(case, reference, result["inputs"])
        sums = MetricSums.unpack(result["sums"])
        close(sums.loss, expected["sums"], "loss per step")
        assert sums.rows.tolist() == expected["counts"].tolist()
        assert sums.hits.tolist() == expected["hits"].tolist()
        close(result["metrics"]["loss_0"], expected["sums"][0] / expected["counts"][0], "metric")
        grads = {
            key.replace("midlayer.", "layers.0.") if reference.config.eagle1 else key: p.grad
            for key, p in reference.named_parameters()
            if p.requires_grad
        }
        assert set(grads) == set(result["grads"])
        for key, gradient in grads.items():
            close(result["grads"][key], gradient, f"gradient of {key} on rank {rank}", 3e-5)


def test_the_module_holds_the_draft_alone(results: list[dict[str, Any]]) -> None:
    for name in CASES:
        assert all(key.startswith("draft.") for key in results[0][name]["names"])
