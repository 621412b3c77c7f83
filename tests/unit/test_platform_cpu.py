"""Megatron on a CPU. Everything that patches runs in its own process, through the harness."""

from __future__ import annotations

import functools
import importlib
import os
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_eagle import compat
from megatron_eagle.platform import enable, is_enabled, recommended_environment
from megatron_eagle.platform.adam import FusedAdam
from megatron_eagle.testing.harness import megatron_parallel, run_distributed

SEQUENCE, BATCH, VOCABULARY = 16, 2, 128


def _patched_names() -> dict[str, Any]:
    paths = (
        *("torch:empty", "torch:Tensor.to", "torch:Tensor.type", "torch.cuda:device_count"),
        *("torch.cuda:Stream", "megatron.core.optimizer:Adam"),
        "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
        "megatron.training.training:initialize_megatron",
    )
    return {path: compat.require(path) for path in paths}


def _enable_twice(rank: int, world_size: int) -> None:
    before = _patched_names()
    assert isinstance(before["torch:empty"], types.BuiltinFunctionType), "importing patched torch"
    assert not is_enabled()
    assert enable()
    first = _patched_names()
    assert all(first[path] is not before[path] for path in before)
    assert enable() and is_enabled()
    assert _patched_names() == first


def test_importing_patches_nothing_and_enable_is_idempotent() -> None:
    run_distributed(_enable_twice, 1)


def _enable_with_cuda(rank: int, world_size: int) -> None:
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"):
        os.environ.pop(name, None)
    before = _patched_names()
    helpers = compat.require("megatron.core.datasets.utils:compile_helpers")
    with mock.patch("torch.cuda.is_available", return_value=True):
        assert not enable()
    assert not is_enabled()
    everywhere = {
        "megatron.core.optimizer:Adam",
        "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
    }
    after = _patched_names()
    assert {path for path in before if after[path] is not before[path]} == everywhere
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert not torch.cuda.is_initialized(), "the allocator would have read its variable"
    assert compat.require("megatron.core.datasets.utils:compile_helpers") is not helpers


def test_with_cuda_only_what_megatron_lacks_there_too_is_patched() -> None:
    run_distributed(_enable_with_cuda, 1)


def _enable_without(rank: int, world_size: int, path: str) -> None:
    module, _, attributes = path.partition(":")
    *parents, name = attributes.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    delattr(owner, name)
    with pytest.raises(compat.MovedSymbolError) as error:
        enable()
    assert path in str(error.value) and compat.installed_megatron() in str(error.value)
    assert not is_enabled()


@pytest.mark.parametrize(
    "path",
    [
        "megatron.core.datasets.utils:compile_helpers",
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        "megatron.core.optimizer.distrib_optimizer:"
        "DistributedOptimizer.load_parameter_state_from_dp_reshardable",
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        "megatron.training.training:initialize_megatron",
        "torch.cuda:current_device",
    ],
)
def test_a_moved_symbol_is_named(path: str) -> None:
    run_distributed(_enable_without, 1, path)


def test_a_moved_module_is_named_but_a_missing_dependency_is_not_blamed_on_megatron() -> None:
    with pytest.raises(compat.MovedSymbolError, match=r"megatron\.core\.gone:Name"):
        compat.require("megatron.core.gone:Name")
    with (
        mock.patch("importlib.import_module", side_effect=ModuleNotFoundError(name="psutil")),
        pytest.raises(ModuleNotFoundError) as error,
    ):
        compat.require("megatron.core.utils:Name")
    assert not isinstance(error.value, compat.MovedSymbolError)


def _cuda_means_cpu(rank: int, world_size: int) -> None:
    enable()
    device = torch.cuda.current_device()
    made = [
        torch.empty(2, device=device),
        torch.zeros(2, device="cuda", pin_memory=True),
        torch.ones_like(torch.ones(2), device=torch.device("cuda", 0)),
        torch.ones(2).new_full((2,), 1.0, device="cuda:0"),
        torch.ones(2).cuda(),
        torch.ones(2).to(0),
        torch.ones(2).to(device="cuda", dtype=torch.bfloat16).pin_memory(),
        torch.nn.Linear(2, 2).to("cuda").weight,
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    assert torch.ones(2).type(torch.float64).dtype == torch.float64
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
    with torch.device("cuda"):
        assert torch.empty(2).device.type == "cpu"
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), first)


def test_device_arguments_and_generators() -> None:
    run_distributed(_cuda_means_cpu, 1)


class _ScaledSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x.square() * w

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        return 2 * x * w * grads[0], x.square() * grads[0]


def _compiled_equals_eager(rank: int, world_size: int) -> None:
    os.environ.pop("TORCHDYNAMO_DISABLE")
    enable()

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        offset = torch.arange(3, device="cuda").to("cuda")
        return (_ScaledSquare.apply(x, w) + offset).exp().sum()

    def gradients(function: Any) -> list[torch.Tensor]:
        x = torch.linspace(0, 1, 3, requires_grad=True)
        w = torch.linspace(1, 2, 3, requires_grad=True)
        return list(torch.autograd.grad(function(x, w), (x, w)))

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled), gradients(loss))


def test_torch_compile_works_on_an_enabled_platform() -> None:
    run_distributed(_compiled_equals_eager, 1)


def _gpt_loss(rank: int, world_size: int, folder: str, experts: int | None, ep: int) -> Any:
    tp = 1 if ep > 1 else world_size
    groups = megatron_parallel(tp=tp, ep=ep)
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        normalization="RMSNorm",
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        expert_model_parallel_size=ep,
        num_moe_experts=experts,
        moe_token_dispatcher_type="alltoall",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            num_experts=experts, moe_grouped_gemm=False, normalization="RMSNorm"
        ),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        pg_collection=groups,
    )
    if world_size == 1:
        dist_checkpointing.save({"model": model.sharded_state_dict()}, folder)
    else:
        saved = dist_checkpointing.load({"model": model.sharded_state_dict()}, folder)
        model.load_state_dict(saved["model"])
    tokens = torch.arange(BATCH * SEQUENCE, device="cuda").view(BATCH, SEQUENCE) * 7 % VOCABULARY
    positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    future = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    loss = model(tokens, positions, future, labels=tokens.roll(-1, 1)).mean()
    loss.backward()
    norm = model.decoder.final_layernorm.weight
    assert norm.sequence_parallel is (tp > 1)
    gradient = norm.grad.clone()
    if tp > 1:
        torch.distributed.all_reduce(gradient, group=groups.tp)
    return loss.item(), gradient


@pytest.mark.parametrize(("experts", "ep"), [(None, 1), (4, 2)])
def test_two_ranks_agree_with_one(tmp_path: Path, experts: int | None, ep: int) -> None:
    """TP=2 with sequence parallelism, and EP=2 with all-to-all, from one rank's weights."""
    [(expected_loss, expected_gradient)] = run_distributed(_gpt_loss, 1, str(tmp_path), experts, 1)
    for loss, gradient in run_distributed(_gpt_loss, 2, str(tmp_path), experts, ep):
        assert loss == pytest.approx(expected_loss, abs=2e-6)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_equals_torch_and_keeps_its_step_in_the_group(decoupled: bool) -> None:
    torch.manual_seed(0)
    ours = [torch.randn(5, 3, requires_grad=True), torch.randn(4, requires_grad=True)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    options: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.95), "weight_decay": 0.1}
    adam = FusedAdam([{"params": ours}, {"params": []}], adam_w_mode=decoupled, **options)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **options)
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        adam.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)
    used, empty = adam.param_groups
    assert used["step"] == 4 and "step" not in empty
    assert set(adam.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}


def test_adam_refuses_cuda_graphs() -> None:
    with pytest.raises(ValueError, match="optimizer_cuda_graph"):
        FusedAdam([torch.zeros(1, requires_grad=True)], capturable=True)


def test_recommended_environment_shares_the_cores() -> None:
    with mock.patch("os.sched_getaffinity", return_value=set(range(8))):
        assert recommended_environment()["OMP_NUM_THREADS"] == "8"
        assert recommended_environment(ranks=4)["OMP_NUM_THREADS"] == "2"
        assert recommended_environment(ranks=16)["OMP_NUM_THREADS"] == "1"
    with pytest.raises(ValueError, match="ranks"):
        recommended_environment(ranks=0)
