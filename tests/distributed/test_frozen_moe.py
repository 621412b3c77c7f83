"""A MoE base with every trap of training (expert bias, aux losses, jitter) stays bit-identical."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.testing.harness import run_distributed
from tests.helpers.pipeline_case import make_case, schedule_of
from tests.helpers.pipeline_fixture import PipelineCase, build_pipeline
from tests.helpers.tiny_hf import make_base

ROUTERS: dict[str, dict[str, Any]] = {
    "sigmoid-expert-bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 1e-2,
        "moe_router_dtype": "fp32",
        "moe_shared_expert_intermediate_size": 32,
    },
    "softmax-aux-loss": {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-2,
        "moe_z_loss_coeff": 1e-3,
        "moe_input_jitter_eps": 1e-2,
    },
}


@pytest.fixture(scope="module")
def dense_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_base(folder / "hf", "llama", num_hidden_layers=7)
    import_base(folder / "hf", folder / "base")
    return folder / "base"


def train_beside_experts(rank: int, world: int, case: PipelineCase, router: dict) -> dict:
    """20 iterations of SGD; what changed of the base, what Megatron logged of its routers."""
    from megatron_eagle.compat import require

    model, step, groups = build_pipeline(
        case, num_experts=4, moe_ffn_hidden_size=24, moe_router_topk=2,
        moe_token_dispatcher_type="alltoall", **router,
    )  # fmt: skip
    eagle, schedule = model.module, schedule_of(model)
    model.train()
    base, draft = _tensors(eagle.base), _tensors(eagle.draft)
    share = case.micro_batches[groups.dp.rank()]
    for _ in range(20):
        model.zero_grad_buffer()
        schedule(
            forward_step_func=step,
            data_iterator=iter(share),
            model=[model],
            num_microbatches=len(share),
            seq_length=24,
            micro_batch_size=2,
            pg_collection=groups,
        )
        with torch.no_grad():
            for parameter in eagle.draft.parameters():
                parameter -= 0.1 * parameter.main_grad
    tracker = require("megatron.core.transformer.moe.moe_logging:get_moe_metrics_tracker")()
    return {
        "changed": [k for k, v in _tensors(eagle.base).items() if not v.equal(base[k])],
        "trained": [k for k, v in _tensors(eagle.draft).items() if not v.equal(draft[k])],
        "router_state": [k for k in base if "expert_bias" in k or "tokens_per_expert" in k],
        "aux_losses": list(tracker.metrics),
    }


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers, saved ones or not."""
    return {
        name: value.detach().clone()
        for name, value in [*module.named_parameters(), *module.named_buffers()]
    }


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(2, {"ep": 2}, id="ep2"),
        pytest.param(4, {"ep": 2, "pp": 2, "first": 3}, id="ep2-pp2", marks=pytest.mark.slow),
        pytest.param(
            4, {"ep": 2, "tp": 2, "sequence_parallel": True}, id="tp2-ep2", marks=pytest.mark.slow
        ),
    ],
)
def test_router_state_and_buffers_stay(
    world: int, layout: dict[str, Any], router: str, dense_base: Path
) -> None:
    data_parallel = world // (layout.get("tp", 1) * layout.get("pp", 1))
    case = make_case(dense_base.parent, "base", 2, data_parallel, **layout)
    for found in run_distributed(train_beside_experts, world, case, ROUTERS[router]):
        assert found["changed"] == []
        assert found["aux_losses"] == []
        assert found["trained"]
        assert bool(found["router_state"]) == (router == "sigmoid-expert-bias")
