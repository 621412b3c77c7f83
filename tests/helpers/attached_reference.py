"""The oracle of an attached draft: what it must learn from the model's hidden states and logits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.helpers.attached_case import HIDDEN, VOCAB, AttachedCase, Data
from tests.reference.eagle3 import ReferenceEagle3
from tests.reference.layers import ReferenceConfig


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
        rope_theta=50000.0 if case.base == "hybrid" else 10000.0,
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
