"""What a trainer sees of an attached draft: its own numbers to the bit, a second optimizer, a
checkpoint, weights for its serving engine; and one line for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.export import export_draft
from megatron_eagle.objective.metrics import MetricSums
from megatron_eagle.testing.harness import run_distributed
from tests.helpers.attached_case import AttachedCase, Data, begin, in_ddp, make_gpt, oracle_inputs
from tests.helpers.attached_mistakes import SAID, mistakes
from tests.helpers.attached_reference import expected_of, reference_of
from tests.helpers.attached_run import attach_case, train_step, trained_base
from tests.helpers.reference_case import close

BASES: dict[str, dict[str, Any]] = {
    "gpt2-dropout": {"kind": "gpt2", "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "llama-recompute": {
        "kind": "llama",
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "hybrid": {"kind": "hybrid", "hidden_dropout": 0.1},
    "moe": {"kind": "moe", "moe_router_enable_expert_bias": True, "moe_aux_loss_coeff": 0.0,
            "moe_router_score_function": "sigmoid"},
}  # fmt: skip


def train(rank: int, world: int, folder: str) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    result: dict[str, Any] = {}
    iteration = Path(folder) / "iter_0000002"
    for name, base in BASES.items():
        runs = []
        for draft in (False, True):
            groups = begin(tp=2)
            runs.append(trained_base(groups=groups, draft=draft, sequence_parallel=True, **base))
        result[name] = runs
        attached = runs[1].pop("beside")["attached"]
        if name == "gpt2-dropout":
            result["weights"] = dict(attached.export_weights())
            result["config"] = attached.export_config()
            dist_checkpointing.save(attached.module.sharded_state_dict(), str(iteration))
    result["reloaded"] = reload(iteration)
    result["moved"] = moving_base()
    result["mixed"] = mixed_precision()
    result["mistakes"] = mistakes()
    return result


def reload(iteration: Path) -> dict[str, Any]:
    """Load the draft in another layout, and try to load it as another draft."""
    from megatron.core import dist_checkpointing

    groups = begin()
    case = AttachedCase(base="gpt2")
    attached = attach_case(case, make_gpt("gpt2", groups), seed=99)
    before = dict(attached.export_weights())
    state = dist_checkpointing.load(attached.module.sharded_state_dict(), str(iteration))
    attached.module.load_state_dict(state)
    result = {"before": before, "after": dict(attached.export_weights()), "errors": []}
    others = {"spec": {"norm_before_residual": True}}, {"vocab": torch.arange(23)}
    for other in others:
        case = AttachedCase(base="gpt2", **other)
        draft = attach_case(case, make_gpt("gpt2", groups)).module
        state = dist_checkpointing.load(draft.sharded_state_dict(), str(iteration))
        with pytest.raises(UserError) as error:
            draft.load_state_dict(state)
        result["errors"].append(str(error.value))
    return result


def moving_base() -> dict[str, Any]:
    """The draft's loss beside a base whose optimizer has stepped since the last loss."""
    groups = begin()
    gpt = make_gpt("gpt2", groups)
    model = in_ddp(gpt.config, gpt)
    case = AttachedCase(base="gpt2")
    attached = attach_case(case, model)
    draft = in_ddp(attached.config, attached.module)
    data = Data.make(documents=False)
    train_step(attached, draft, model, data, groups)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(0.1 * parameter.sign())
    with attached.paused():
        inputs = oracle_inputs(gpt, data)
    draft.zero_grad_buffer()
    result = train_step(attached, draft, model, data, groups)
    return {**result, "inputs": inputs, "weights": dict(attached.export_weights())}


def mixed_precision() -> dict[str, Any]:
    """Losses per step beside a base in bfloat16, of a draft in float32 and one in bfloat16."""
    groups = begin()
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(5)
        gpt = make_gpt("llama", groups, params_dtype=torch.bfloat16, bf16=True)
        gpt = gpt.bfloat16()
        attached = attach_case(AttachedCase(), gpt, dtype=dtype)
        assert {p.dtype for p in attached.module.parameters()} == {dtype}
        draft = in_ddp(attached.config, attached.module)
        model = in_ddp(gpt.config, gpt)
        step = train_step(attached, draft, model, Data.make(documents=False), groups)
        losses[str(dtype)] = MetricSums.unpack(step["sums"]).loss
    return losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attached")
    (folder / "iter_0000002").mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return run_distributed(train, 2, str(folder))


@pytest.mark.parametrize("name", BASES)
def test_the_base_does_not_notice(results: list[dict[str, Any]], name: str) -> None:
    for alone, beside in (result[name] for result in results):
        assert alone["losses"] == beside["losses"]
        assert alone["norms"] == beside["norms"]
        for key in ("grads", "weights"):
            assert len(alone[key]) == len(beside[key]) > 0
            assert all(map(torch.equal, alone[key], beside[key])), key
        assert alone["random"].equal(beside["random"])


@pytest.mark.parametrize("name", BASES)
def test_the_drafts_norm_is_its_own(results: list[dict[str, Any]], name: str) -> None:
    for _, beside in (result[name] for result in results):
        for exported, reported in beside["draft_norms"]:
            assert reported == pytest.approx(exported, rel=1e-5)


def test_exported_weights_equal_converted_files(
    results: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    import json

    from safetensors.torch import load_file

    export_draft(folder, tmp_path / "hf")
    converted = load_file(tmp_path / "hf" / "model.safetensors")
    for result in results:
        assert set(result["weights"]) == set(converted)
        assert all(result["weights"][name].equal(tensor) for name, tensor in converted.items())
        assert result["config"] == json.loads((tmp_path / "hf" / "config.json").read_text())


def test_a_checkpoint_loads_in_another_layout(results: list[dict[str, Any]]) -> None:
    for result in results:
        before, after = result["reloaded"]["before"], result["reloaded"]["after"]
        assert not before["fc.weight"].equal(after["fc.weight"])
        assert all(after[name].equal(tensor) for name, tensor in result["weights"].items())
        spec, vocabulary = result["reloaded"]["errors"]
        assert spec.startswith("norm_before_residual: this run has True")
        assert vocabulary == "vocab_ids: the draft in the state dict has other token ids"


def test_the_teacher_follows_a_base_that_trains(results: list[dict[str, Any]]) -> None:
    case = AttachedCase(base="gpt2")
    for result in (r["moved"] for r in results):
        expected = expected_of(case, reference_of(case, result), result["inputs"])
        close(MetricSums.unpack(result["sums"]).loss, expected["sums"], "loss per step")


def test_a_draft_of_either_precision_beside_bfloat16(results: list[dict[str, Any]]) -> None:
    losses = results[0]["mixed"]
    close(losses["torch.bfloat16"], losses["torch.float32"], "loss per step", 2e-2)


@pytest.mark.parametrize("mistake", SAID)
def test_a_mistake_is_one_clear_line(results: list[dict[str, Any]], mistake: str) -> None:
    for result in results:
        assert result["mistakes"][mistake].startswith(SAID[mistake])
