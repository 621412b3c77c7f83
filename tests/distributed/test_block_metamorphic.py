"""What must and must not change a block's outputs: every trap of block drafts, one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.block_case import DSPARK, BlockCase, build_batch, build_model, make_case

SEQUENCE, DOCUMENT = 1, 3
"""The document of tokens 3 .. 16 in the second packed sequence."""
ANCHOR = 7


def outputs_of(case: BlockCase, shift: tuple[int, int] = (0, 0)) -> dict[str, Tensor]:
    """Outputs [B, H] and logits [B, D] of the block at ANCHOR; ``shift`` moves the positions of
    context and block."""
    model, batch = build_model(case), build_batch(case)
    assert batch.packing is not None
    batch = dataclasses.replace(
        batch, positions=batch.positions + shift[1],
        packing=dataclasses.replace(
            batch.packing, positions=batch.packing.positions + shift[0]
        ),
    )  # fmt: skip
    starts = [slab.blocks.start for slab in batch.plan.slabs]
    assert starts[0] == 0
    objective, slots = model.block_objective, case.config.block_size
    base = model.base(batch.tokens, batch.packing)
    outputs = objective.outputs(batch, base.features)
    every = dataclasses.replace(batch, block_rows=torch.arange(outputs.shape[0] * slots))
    rows = objective.judged_rows(every, outputs)
    joint, _ = model.draft.joint_head()
    logits = (rows[:, : joint.shape[1]] @ joint.t()).unflatten(0, (-1, slots))
    # The block is found by its place, since its token may have been changed.
    places = [int(x) for x in batch.positions[: batch.plan.count] - shift[1]]
    sequences = place_sequences(case, places)
    index = [i for i, p in enumerate(places) if (sequences[i], p) == (SEQUENCE, ANCHOR - DOCUMENT)]
    return {"outputs": outputs[index[0]].detach(), "logits": logits[index[0]].detach()}


def place_sequences(case: BlockCase, places: list[int]) -> list[int]:
    """Which sequence each block is in: all of the first come before those of the second."""
    mask = torch.nn.functional.pad(case.loss_mask[:, :-1] > 0, (1, 0))
    assert case.positions is not None
    supervised = mask & (case.positions > 0)
    follows = torch.nn.functional.pad(supervised[:, 1:], (0, 1))
    first = int((supervised & follows)[0].sum())
    first = min(first, case.anchors)
    return [0] * first + [1] * (len(places) - first)


def everything(rank: int, world: int, case: BlockCase) -> dict[str, dict[str, Tensor]]:
    megatron_parallel()

    def changed(**fields: Any) -> dict[str, Tensor]:
        return outputs_of(dataclasses.replace(case, **fields))

    def aux(*rows: int) -> Tensor:
        features = case.aux.clone()
        features[SEQUENCE, list(rows)] += 1.0
        return features

    def weights(*names: str) -> dict[str, Tensor]:
        return {name: 10 * w if name.endswith(names) else w for name, w in case.weights.items()}

    tokens, embedding = case.tokens.clone(), case.embedding.clone()
    tokens[SEQUENCE, ANCHOR + 1] = (tokens[SEQUENCE, ANCHOR + 1] + 1) % case.config.vocab_size
    embedding[case.config.mask_token] += 1.0
    return {
        "as it is": outputs_of(case),
        "features from the anchor on": changed(aux=aux(*range(ANCHOR, 24))),
        "features before the anchor": changed(aux=aux(ANCHOR - 1)),
        "features of other documents": changed(aux=aux(0, 1, 2, 17, 18)),
        "next token": changed(tokens=tokens),
        "fewer anchors": changed(anchors=5),
        "mask embedding": changed(embedding=embedding),
        "all positions": outputs_of(case, (7, 7)),
        "the block's positions": outputs_of(case, (0, 7)),
        "queries": changed(weights=weights("q_proj.weight", "k_proj.weight")),
        "fc": changed(weights=weights("fc.weight")),
    }


@pytest.mark.parametrize("kind", ["dflash", "dspark"])
def test_changes(kind: str) -> None:
    case = make_case(packed=True, **(DSPARK if kind == "dspark" else {}), rms_eps=1e-12)
    case.loss_mask.fill_(1.0)
    assert int(case.tokens[SEQUENCE, ANCHOR]) != case.config.mask_token
    (found,) = run_distributed(everything, 1, case)
    as_it_is = found.pop("as it is")["outputs"]
    tight = {"rtol": 1e-4, "atol": 1e-5}
    same = (
        "features from the anchor on", "features of other documents", "next token",
        "fewer anchors", "all positions", "queries", "fc",
    )  # fmt: skip
    for name, result in found.items():
        per_slot = (result["outputs"] - as_it_is).abs().amax(-1)
        if name in same:
            torch.testing.assert_close(result["outputs"], as_it_is, **tight, msg=name)
        else:
            assert (per_slot > 1e-3).all(), f"{name}: {per_slot}"


def test_only_the_markov_head_sees_the_next_token() -> None:
    case = make_case(packed=True, **DSPARK)
    case.loss_mask.fill_(1.0)
    (found,) = run_distributed(everything, 1, case)
    change = found["next token"]["logits"] - found["as it is"]["logits"]
    before = int(case.tokens[SEQUENCE, ANCHOR + 1])
    w1 = case.weights["markov_head.markov_w1.weight"]
    w2 = case.weights["markov_head.markov_w2.weight"]
    expected = (w1[(before + 1) % case.config.vocab_size] - w1[before]) @ w2.t()
    torch.testing.assert_close(change[1], expected, rtol=1e-4, atol=1e-5)
    assert not change[[0, 2, 3]].any()
