"""Every pipeline stage trains: losses and gradients equal the reference's, in every layout."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_eagle.hf.import_base import import_base
from megatron_eagle.parallel.stage_plan import stage_actions
from tests.distributed.harness import run_distributed
from tests.distributed.test_reference_parity import close
from tests.draft_fixture import Case, local_part, megatron_names
from tests.pipeline_fixture import PipelineCase, build_pipeline
from tests.reference_eagle3 import ReferenceConfig, ReferenceEagle3
from tests.tiny_hf import SIZES, make_base

LAYERS, CAPTURED, LENGTH = 7, (0, 3, 6), 24
CONFIG = ReferenceConfig(
    hidden_size=SIZES["hidden_size"],
    target_hidden_size=SIZES["hidden_size"],
    intermediate_size=SIZES["intermediate_size"],
    num_heads=SIZES["num_attention_heads"],
    num_kv_heads=SIZES["num_key_value_heads"],
    head_dim=8,
    vocab_size=SIZES["vocab_size"],
    draft_vocab_size=23,
    rms_eps=SIZES["rms_norm_eps"],
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name, tied in (("tied", True), ("untied", False)):
        fields = {"num_hidden_layers": LAYERS, "tie_word_embeddings": tied}
        make_base(folder / f"{name}_hf", "llama", **fields)
        import_base(folder / f"{name}_hf", folder / name)
    return folder


def make_case(bases: Path, name: str, micro_batches: int, dp: int, **layout: Any) -> PipelineCase:
    torch.manual_seed(0)
    source = bases / f"{name}_hf"
    weights = load_file((source if source.is_dir() else bases / "hf") / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    ids = torch.randperm(CONFIG.vocab_size)[: CONFIG.draft_vocab_size].sort().values
    reference = ReferenceEagle3(CONFIG, embedding, ids)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0.0, 0.2).add_(1.0 if parameter.dim() == 1 else 0.0)
    nothing = torch.empty(0)
    draft = Case(
        config=CONFIG,
        weights={name: p.detach().clone() for name, p in reference.named_parameters()},
        vocab_ids=ids,
        embedding=embedding,
        output_weight=weights.get("lm_head.weight", embedding),
        aux=nothing,
        final_hidden=nothing,
        tokens=nothing,
        loss_mask=nothing,
        sequence_parallel=layout.get("sequence_parallel", False),
    )

    def micro_batch(index: int) -> tuple[Tensor, Tensor]:
        mask = torch.rand(2, LENGTH) < 0.6
        mask[:, LENGTH - 2 - 3 * (index % 3) :] = False  # lengths differ once trimmed
        return torch.randint(CONFIG.vocab_size, (2, LENGTH)), mask.float()

    given = [[micro_batch(i) for i in range(micro_batches)] for _ in range(dp)]
    return PipelineCase(draft, str(bases / name), CAPTURED, given, **layout)


def outputs_of_base(rank: int, world: int, case: PipelineCase) -> list[list[tuple[Tensor, Tensor]]]:
    """What the undivided base gives for every micro-batch, [B, S, ...]."""
    undivided = {"tp": 1, "pp": 1, "cp": 1, "first": None, "sequence_parallel": False}
    model, _, _ = build_pipeline(dataclasses.replace(case, **undivided))
    found = []
    for share in case.micro_batches:
        runs = [model.module.base(tokens) for tokens, _ in share]
        found.append([(r.features.transpose(0, 1), r.final_hidden.transpose(0, 1)) for r in runs])
    return found


def train_once(rank: int, world: int, case: PipelineCase) -> dict[str, Any]:
    """One iteration of the schedule: reports, finished gradients, what was held at most."""
    from megatron_eagle.training.pipeline import PipelineSchedule

    model, step, groups = build_pipeline(case)
    share = case.micro_batches[groups.dp.rank()]
    reports = PipelineSchedule()(
        forward_step_func=step,
        data_iterator=iter(share),
        model=[model],
        num_microbatches=len(share),
        pg_collection=groups,
    )
    draft = model.module.draft
    sums = torch.stack([report["eagle_sums"] for report in reports]).sum(0)
    for group in (groups.dp_cp, groups.pp):
        torch.distributed.all_reduce(sums, group=group)
    if case.distributed_optimizer:  # each rank has finished its shard only
        for buffer in model.buffers:
            shard = buffer.grad_data.chunk(groups.dp_cp.size())[groups.dp_cp.rank()].clone()
            torch.distributed.all_gather_into_tensor(buffer.grad_data, shard, group=groups.dp_cp)
    return {
        "micro_batches": len(reports),
        "sums": sums,
        "grads": {name: p.main_grad.clone() for name, p in draft.named_parameters()},
        "shared": {getattr(p, "shared", False) for p in draft.parameters()},
        "vocab": (draft.shard.start, draft.shard.rows),
        "tp": (groups.tp.rank(), groups.tp.size()),
        "stage": groups.pp.rank(),
    }


def expectation(case: PipelineCase) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference's sums and gradients per supervised row, over all micro-batches."""
    reference = ReferenceEagle3(CONFIG, case.draft.embedding, case.draft.vocab_ids)
    reference.load_state_dict(case.draft.weights, strict=False)
    (outputs,) = run_distributed(outputs_of_base, 1, case)
    sums: dict[str, Tensor] = {}
    for share, given in zip(outputs, case.micro_batches, strict=True):
        for (aux, final), (tokens, mask) in zip(share, given, strict=True):
            found = reference.forward_ttt(aux, tokens, final @ case.draft.output_weight.t(), mask)
            (found["loss"] * found["counts"][0]).backward()
            for key in ("loss_sums", "counts", "hits"):
                sums[key] = sums.get(key, 0) + found[key].detach()
    rows = sums["counts"][0]
    return sums, {name: p.grad / rows for name, p in reference.named_parameters()}


UNEVEN2, UNEVEN3, UNEVEN4 = (
    {"pp": 2, "first": 3}, {"pp": 3, "first": 3}, {"pp": 4, "first": 1},
)  # fmt: skip
SP = {"tp": 2, "sequence_parallel": True}
DO = {"distributed_optimizer": True}
slow = pytest.mark.slow
CASES = [
    pytest.param(2, "tied", 5, 1, UNEVEN2, id="pp2-uneven-micro-batches"),
    pytest.param(3, "untied", 5, 1, UNEVEN3, id="pp3-untied"),
    pytest.param(4, "untied", 3, 1, {**UNEVEN2, **SP}, id="tp2-sp-pp2-untied"),
    pytest.param(2, "untied", 2, 1, UNEVEN2, id="pp2-untied-one-each", marks=slow),
    pytest.param(3, "tied", 7, 1, UNEVEN3, id="pp3-tied", marks=slow),
    pytest.param(4, "tied", 4, 1, UNEVEN4, id="pp4-tied", marks=slow),
    pytest.param(4, "untied", 9, 1, UNEVEN4, id="pp4-untied", marks=slow),
    pytest.param(4, "tied", 3, 1, {**UNEVEN2, "cp": 2}, id="cp2-pp2", marks=slow),
    pytest.param(4, "tied", 4, 2, {**UNEVEN2, **DO}, id="pp2-dp2-do"),
    pytest.param(4, "tied", 3, 2, UNEVEN2, id="pp2-dp2", marks=slow),
    pytest.param(4, "tied", 3, 1, {**UNEVEN2, "tp": 2}, id="tp2-pp2", marks=slow),
]


@pytest.mark.parametrize(("world", "name", "micro_batches", "dp", "layout"), CASES)
def test_equals_reference(
    world: int, name: str, micro_batches: int, dp: int, layout: dict[str, Any], bases: Path
) -> None:
    case = make_case(bases, name, micro_batches, dp, **layout)
    results = run_distributed(train_once, world, case)
    sums, gradients = expectation(case)
    for rank, found in enumerate(results):
        losses, counts, hits = found["sums"][:-2].view(-1, CONFIG.ttt_steps)[:3]
        close(losses, sums["loss_sums"], "loss per step")
        assert counts.tolist() == sums["counts"].tolist()
        assert hits.tolist() == sums["hits"].tolist()
        own = len(range(found["stage"], micro_batches, case.pp))
        assert found["micro_batches"] == own
        assert found["shared"] == {found["stage"] > 0}, "the norm counts the first stage alone"
        for parameter, (sources, kind) in megatron_names(case.draft).items():
            whole = local_part([gradients[s] for s in sources], kind, case.draft, *found["tp"])
            gradient = found["grads"][parameter]
            if kind == "vocab":
                start, rows = found["vocab"]
                whole, gradient = whole[start : start + rows], gradient[:rows]
            close(gradient, whole, f"gradient of {parameter} on rank {rank}")
            for other in results:
                if other["tp"] == found["tp"]:
                    assert other["grads"][parameter].equal(found["grads"][parameter])


class SleepingStages:
    """An observer that makes every base forward and draft step last a given time, and notes when
    things happened."""

    def __init__(self, base: float, draft: float) -> None:
        self.lasts = {"base": base, "draft": draft}
        self.events: list[tuple[str, int, float, float]] = []

    @contextmanager
    def __call__(self, kind: str, micro_batch: int) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if kind in self.lasts:
            time.sleep(max(0.0, started + self.lasts[kind] - time.perf_counter()))
        self.events.append((kind, micro_batch, started, time.perf_counter()))


def record_events(rank: int, world: int, case: PipelineCase, base: float, draft: float) -> Any:
    from megatron_eagle.training.pipeline import PipelineSchedule

    model, step, groups = build_pipeline(case)
    observer = SleepingStages(base, draft)
    for _ in range(2):  # the first warms up
        observer.events.clear()
        torch.distributed.barrier()
        PipelineSchedule(observer)(
            forward_step_func=step,
            data_iterator=iter(case.micro_batches[0]),
            model=[model],
            num_microbatches=len(case.micro_batches[0]),
            pg_collection=groups,
        )
    return observer.events


def test_no_stage_waits_for_the_draft_of_another(bases: Path) -> None:
    """Two balanced stages, eight micro-batches: work that sleeps, so that it needs no core."""
    base, draft = 0.15, 0.45
    case = make_case(bases, "tied", 8, 1, pp=2, first=3)
    stages = run_distributed(record_events, 2, case, base, draft)
    for stage, events in enumerate(stages):
        kinds = [(kind, m) for kind, m, _, _ in events if kind != "wait"]
        assert kinds == [(a.kind, a.micro_batch) for a in stage_actions(stage, 2, 8)]
        begin, end = events[0][2], events[-1][3]
        busy = sum(stop - start for kind, _, start, stop in events if kind != "wait")
        assert busy / (end - begin) > 0.9, f"stage {stage} was busy {busy / (end - begin):.0%}"
        first_wait, *others = [stop - start for kind, _, start, stop in events if kind == "wait"]
        assert first_wait < 2 * base, "the fill"
        assert max(others) < draft / 2, f"stage {stage} waited {max(others):.2f} s"
