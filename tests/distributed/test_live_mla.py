"""MLA layers make queries of live rows alone; that the results stay the same is compared with the
reference in test_reference_parity.py."""

from __future__ import annotations

from typing import Any

from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.draft_fixture import Case, build_model
from tests.helpers.reference_case import MLA, make_case

CASES = {
    "low rank": {**MLA, "num_layers": 2},
    "full rank": {**MLA, "q_lora_rank": 0},
    "P-EAGLE": {**MLA, "mask_token": 7},
}


def projected_rows(rank: int, world: int, cases: dict[str, Case]) -> dict[str, Any]:
    """By case, the rows that each call of the last layer's query and key projections gets."""
    megatron_parallel()
    from megatron_eagle.objective.batch import EagleBatch

    found: dict[str, Any] = {}
    for name, case in cases.items():
        model = build_model(case)
        attention = model.draft.layers[-1].self_attention
        queries = attention.linear_q_up_proj if case.config.q_lora_rank else attention.linear_q_proj
        rows = {"queries": _rows_given(queries), "keys": _rows_given(attention.linear_kv_up_proj)}
        batch = EagleBatch.build(case.tokens, case.loss_mask, case.config.ttt_steps, multiple=1)
        model(batch)[0].backward()
        found[name] = {**rows, "live": batch.live.index.numel(), "all": batch.live.total}
    return found


def _rows_given(module: Any) -> list[int]:
    """Return a list that gets the rows of the [S, B, C] that each call of ``module`` is given."""
    rows: list[int] = []
    module.register_forward_pre_hook(
        lambda module, args: rows.append(args[0].shape[0] * args[0].shape[1])
    )
    return rows


def test_only_live_rows_have_queries() -> None:
    cases = {name: make_case(**changes)[0] for name, changes in CASES.items()}
    found = run_distributed(projected_rows, 1, cases)[0]
    for name in ("low rank", "full rank"):
        live, every = found[name]["live"], found[name]["all"]
        assert live < every
        assert found[name]["queries"] == [live] * 3
        assert found[name]["keys"] == [every, live, live]
    live, every = found["P-EAGLE"]["live"], found["P-EAGLE"]["all"]
    assert found["P-EAGLE"] == {
        "queries": [3 * live], "keys": [every + 2 * live], "live": live, "all": every
    }  # fmt: skip
