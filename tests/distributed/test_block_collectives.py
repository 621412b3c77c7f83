"""How many collectives a micro-batch of blocks costs, and how many bytes its loss sends."""

from __future__ import annotations

from typing import Any

from megatron_eagle.testing.collectives import CollectiveCounter
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.block_case import DSPARK, BlockCase, build_batch, build_model, make_case

LAYERS = 2


def count(rank: int, world: int, cases: list[BlockCase]) -> list[dict[str, Any]]:
    groups = megatron_parallel(tp=world // cases[0].cp, cp=cases[0].cp)
    found = []
    for case in cases:
        model, batch = build_model(case), build_batch(case, groups)
        model(batch)  # the mask token's embedding is looked up once, at the first micro-batch
        with CollectiveCounter() as forward:
            loss, _ = model(batch)
        with CollectiveCounter() as backward:
            loss.backward()
        found.append(
            {
                "forward": dict(forward.calls), "backward": dict(backward.calls),
                "gathered": forward.gathered, "rows": batch.block_rows.numel(),
                "targets": batch.target_rows.numel(),
            }
        )  # fmt: skip
    return found


def test_tensor_parallelism() -> None:
    for fill_in, kl, spark in run_distributed(count, 2, [make_case(), make_case(ce=0.0, kl=1.0),
                                                         make_case(**DSPARK)]):  # fmt: skip
        # The anchors' embeddings, then attention output and MLP output of every layer. Gathers: fc,
        # and the loss.
        assert fill_in["forward"] == {"allreduce": 1 + 2 * LAYERS, "allgather_base": 2}
        # The rows of the head, c, and the qkv and fc1 inputs of every layer.
        assert fill_in["backward"] == {"allreduce": 2 + 2 * LAYERS}
        assert fill_in["gathered"][-1] == 5 * fill_in["rows"] + 5 * fill_in["targets"]
        assert kl["forward"] == fill_in["forward"]
        assert kl["gathered"][-1] == 4 * kl["rows"] + 5 * kl["targets"], "16 bytes a row"
        # W1's rows, and the acceptance rates.
        assert spark["forward"] == {"allreduce": 3 + 2 * LAYERS, "allgather_base": 2}
        assert spark["backward"] == fill_in["backward"]


def test_sequence_parallelism() -> None:
    cases = [make_case(sequence_parallel=True, counts_data=data) for data in (False, True)]
    for found, of_data in run_distributed(count, 2, cases):
        # Gathers: the final hidden, c, qkv and fc1 inputs of every layer, the rows, the loss.
        assert found["forward"] == {
            "reduce_scatter_base": 1 + 2 * LAYERS, "allgather_base": 4 + 2 * LAYERS,
        }  # fmt: skip
        spared = found["forward"] | {"allgather_base": 3 + 2 * LAYERS}
        assert of_data["forward"] == spared, "no teacher reads the base's final hidden state"


def test_context_parallelism() -> None:
    for (found,) in run_distributed(count, 2, [make_case(cp=2)]):
        # The final hidden's halo; the context's keys and values, once per layer.
        assert found["forward"] == {"allgather_base": 1 + LAYERS}
        assert found["backward"] == {"reduce_scatter_base": LAYERS}
