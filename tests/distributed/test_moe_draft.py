"""MoE and MLA drafts on pipeline stages, and experts cut over ranks: the reference's gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.testing.harness import run_distributed
from tests.helpers.draft_fixture import Case, local_part, megatron_names
from tests.helpers.pipeline_case import AUX_LAYERS, LENGTH, outputs_of_base
from tests.helpers.pipeline_case import CONFIG as DENSE
from tests.helpers.pipeline_fixture import PipelineCase, build_pipeline
from tests.helpers.reference_case import close
from tests.helpers.tiny_hf import make_base
from tests.reference.eagle3 import ReferenceEagle3

EXPERTS = {"num_experts": 4, "topk": 2, "balance": 0.5, "intermediate_size": 32}
GROUPED = dataclasses.replace(DENSE, **EXPERTS, head_dim=12, num_layers=2)
MLA = dataclasses.replace(
    DENSE, **EXPERTS, head_dim=6, q_lora_rank=20, kv_lora_rank=16, qk_rope_head_dim=4, v_head_dim=8
)
BASES = {"qwen3_moe": GROUPED, "deepseek_v3": MLA}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family in BASES:
        make_base(folder / family / "hf", family, num_hidden_layers=7)
        import_base(folder / family / "hf", folder / family / "base")
    return folder


def make_case(folder: Path, micro_batches: int, dp: int, **layout: Any) -> PipelineCase:
    torch.manual_seed(0)
    config = BASES[folder.name]
    weights = load_file(folder / "hf" / "model.safetensors")
    embedding, output = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    ids = torch.randperm(config.vocab_size)[: config.draft_vocab_size].sort().values
    reference = ReferenceEagle3(config, embedding, ids)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0.0, 0.2).add_(1.0 if parameter.dim() == 1 else 0.0)
    own = {name: p.detach().clone() for name, p in reference.named_parameters()}
    nothing = torch.empty(0)
    draft = Case(
        config, own, ids, embedding, output, nothing, nothing, nothing, nothing,
        sequence_parallel=layout.get("sequence_parallel", False),
    )  # fmt: skip

    def micro_batch() -> tuple[Tensor, Tensor]:
        mask = (torch.rand(2, LENGTH) < 0.6).float()
        mask[:, -2] = 1  # nothing is trimmed: the balance loss is one of all tokens
        return torch.randint(config.vocab_size, (2, LENGTH)), mask

    given = [[micro_batch() for _ in range(micro_batches)] for _ in range(dp)]
    return PipelineCase(draft, str(folder / "base"), AUX_LAYERS, given, **layout)


def train_once(rank: int, world: int, case: PipelineCase, save: str) -> dict[str, Any]:
    """One iteration: the finished gradients; the draft is saved in ``save``."""
    from megatron.core import dist_checkpointing
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_eagle.compat import finalize_model_grads
    from megatron_eagle.pipeline.schedule import PipelineSchedule

    model, step, groups = build_pipeline(case)
    share = case.micro_batches[groups.dp.rank()]
    call = {
        "forward_step_func": step,
        "data_iterator": iter(share),
        "model": [model],
        "num_microbatches": len(share),
    }
    if case.pp > 1:
        PipelineSchedule()(**call, pg_collection=groups)
    else:
        model.module.config.finalize_model_grads_func = finalize_model_grads
        get_forward_backward_func()(
            **call, seq_length=LENGTH, micro_batch_size=2, forward_only=False
        )
    dist_checkpointing.save(model.module.sharded_state_dict(), save)
    draft = model.module.draft
    return {
        "grads": {name: p.main_grad.clone() for name, p in draft.named_parameters()},
        "vocab": (draft.shard.start, draft.shard.rows),
        "tp": (groups.tp.rank(), groups.tp.size()),
        "ep": (groups.ep.rank(), groups.ep.size()),
    }


def loaded(rank: int, world: int, case: PipelineCase, saved: str) -> dict[str, Tensor]:
    """What an undivided draft loads from ``saved``."""
    from megatron.core import dist_checkpointing

    model, _, _ = build_pipeline(case)
    draft = model.module.draft
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.fill_(7.0)
    model.module.load_state_dict(
        dist_checkpointing.load(model.module.sharded_state_dict(), saved), strict=False
    )
    return {name: p.detach().clone() for name, p in draft.named_parameters()}


UNDIVIDED = {"tp": 1, "pp": 1, "cp": 1, "ep": 1, "first": None, "sequence_parallel": False}
PP2 = {"pp": 2, "first": 3}
TP2 = {"tp": 2, "sequence_parallel": True}
slow = pytest.mark.slow
CASES = [
    pytest.param(2, "qwen3_moe", 1, {"ep": 2}, id="ep2"),
    pytest.param(2, "deepseek_v3", 3, PP2, id="pp2-mla"),
    pytest.param(2, "qwen3_moe", 3, PP2, id="pp2", marks=slow),
    pytest.param(2, "deepseek_v3", 1, {"ep": 2}, id="ep2-mla", marks=slow),
    pytest.param(4, "qwen3_moe", 1, {**TP2, "ep": 2}, id="tp2-sp-ep2", marks=slow),
    pytest.param(4, "qwen3_moe", 3, {**PP2, "ep": 2}, id="ep2-pp2", marks=slow),
]


@pytest.mark.parametrize(("world", "family", "micro_batches", "layout"), CASES)
def test_equals_reference(
    world: int, family: str, micro_batches: int, layout: dict[str, Any], bases: Path, tmp_path: Path
) -> None:
    data_parallel = world // (layout.get("tp", 1) * layout.get("pp", 1))
    case = make_case(bases / family, micro_batches, data_parallel, **layout)
    results = run_distributed(train_once, world, case, str(tmp_path))
    gradients = expectation(case)
    for rank, found in enumerate(results):
        for name, (sources, kind) in megatron_names(case.draft, found["ep"]).items():
            whole = local_part([gradients[s] for s in sources], kind, case.draft, *found["tp"])
            gradient = found["grads"][name]
            if kind == "vocab":
                start, rows = found["vocab"]
                whole, gradient = whole[start : start + rows], gradient[:rows]
            close(gradient, whole, f"gradient of {name} on rank {rank}")
    undivided = dataclasses.replace(case, **UNDIVIDED)
    (back,) = run_distributed(loaded, 1, undivided, str(tmp_path))
    one = dataclasses.replace(case.draft, sequence_parallel=False)
    for name, (sources, kind) in megatron_names(one).items():
        expected = local_part([one.weights[s] for s in sources], kind, one, 0, 1)
        assert back[name][: expected.shape[0]].equal(expected), name


def expectation(case: PipelineCase) -> dict[str, Tensor]:
    """The reference's gradients per supervised row, over all micro-batches."""
    (outputs,) = run_distributed(outputs_of_base, 1, dataclasses.replace(case, **UNDIVIDED))
    config = case.draft.config
    total: dict[str, Tensor] = {}
    rows = 0
    rest = iter(outputs)
    for share in case.micro_batches:
        for tokens, mask in share:
            sequences = [next(rest) for _ in tokens]
            aux, final = (torch.cat(parts) for parts in zip(*sequences, strict=True))
            reference = ReferenceEagle3(config, case.draft.embedding, case.draft.vocab_ids)
            reference.load_state_dict(case.draft.weights, strict=False)
            found = reference.forward_ttt(aux, tokens, final @ case.draft.output_weight.t(), mask)
            (found["loss"] * found["counts"][0]).backward()
            rows += int(found["counts"][0])
            for name, p in reference.named_parameters():
                total[name] = total.get(name, torch.zeros(())) + p.grad
    return {name: gradient / rows for name, gradient in total.items()}
