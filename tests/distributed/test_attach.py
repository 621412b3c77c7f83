"""A draft attached to a model in memory learns what the reference learns, in every layout, and the
model does not notice."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eagle.objective.metrics import MetricSums
from megatron_eagle.testing.harness import run_distributed
from tests.helpers.attached_case import HIDDEN, VOCAB, AttachedCase, Data
from tests.helpers.attached_run import run_attached
from tests.helpers.reference_case import close
from tests.reference.eagle3 import ReferenceEagle3
from tests.reference.layers import ReferenceConfig

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
    "ep2-moe": AttachedCase(base="moe", ep=2, draft_vocab=None),
}


def run_all(rank: int, world: int, folder: str) -> dict[str, Any]:
    return {name: run_attached(rank, world, case, folder) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed(run_all, 2, str(tmp_path_factory.mktemp("bases")))


def reference_of(case: AttachedCase, result: dict[str, Any]) -> ReferenceEagle3:
    """The oracle with the weights that the draft exports."""
    algorithm = case.spec.get("algorithm", "eagle3")
    eagle1 = algorithm == "eagle1"
    inputs, ids = result["inputs"], case.vocab_ids()
    config = ReferenceConfig(
        hidden_size=HIDDEN, target_hidden_size=HIDDEN, intermediate_size=48, num_heads=4,
        num_kv_heads=4 if case.base == "gpt2" else 2, head_dim=8, vocab_size=VOCAB,
        draft_vocab_size=case.draft_vocab or VOCAB, num_aux=1 if eagle1 else 3,
        eagle1=eagle1, fc_norm=algorithm == "eagle3.1", norm_output=algorithm == "eagle3.1",
        mask_token=case.spec.get("mask_token"),
        **({"ttt_steps": 3, "loss": "kl"} | case.train),
    )  # fmt: skip
    reference = ReferenceEagle3(config, inputs["embedding"], ids)
    weights = {k: v for k, v in result["weights"].items() if k not in ("d2t", "t2d", "fc.bias")}
    one = {k.replace("layers.0.", "midlayer."): v for k, v in weights.items()}
    if eagle1:
        one["lm_head.weight"] = inputs["output"]
        reference.lm_head.requires_grad_(False)
    missing, unexpected = reference.load_state_dict(one, strict=False)
    assert not unexpected
    assert set(missing) <= {"d2t", "t2d"}
    return reference


def expected_of(case: AttachedCase, reference: ReferenceEagle3, inputs: dict[str, Tensor]) -> Any:
    """Sums of all sequences, or of all their documents, each one alone; and the loss's backward."""
    data = Data.make(case.documents)
    aux = inputs["final"] if reference.config.eagle1 else inputs["aux"]
    spans = []
    for row, positions in enumerate(data.position_ids):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
        spans += [(row, slice(a, b)) for a, b in pairwise(starts)]
    results = [
        reference.forward_ttt(
            aux[row : row + 1, span],
            data.tokens[row : row + 1, span],
            inputs["logits"][row : row + 1, span],
            data.loss_mask[row : row + 1, span],
        )
        for row, span in spans
    ]
    counts = torch.stack([r["counts"] for r in results]).sum(0)
    loss = sum(r["loss"] * r["counts"][0] for r in results) / counts[0]
    loss.backward()
    return {
        "sums": torch.stack([r["loss_sums"].detach() for r in results]).sum(0),
        "counts": counts,
        "hits": torch.stack([r["hits"] for r in results]).sum(0),
    }


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
