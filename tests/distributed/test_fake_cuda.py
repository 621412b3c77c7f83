"""Base, draft, loss and attention on CUDA's devices and dtypes, by fake tensors: no GPU needed."""

from __future__ import annotations

from argparse import Namespace
from unittest import mock

import pytest
import torch

from megatron_eagle.testing.harness import run_distributed
from tests.helpers.fake_cuda import DEVICE, RecordedFunctions, fake_cuda

VOCAB = 61
BASE_ARGS = {
    "num_layers": 7,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "group_query_attention": True,
    "num_query_groups": 4,
    "kv_channels": 8,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_base": 10000,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "vocab_size": VOCAB,
    "make_vocab_size_divisible_by": 4,
    "max_position_embeddings": 64,
    "untie_embeddings_and_output_weights": True,
}


def _train_forward(rank: int, _: int, world: int, sequence_parallel: bool, dtype: str) -> tuple:
    """What the trainer does up to the loss, and the backward of our own autograd functions;
    returns the devices and dtypes it ended with."""
    fake = fake_cuda(world)
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_eagle.checkpoint.directory import BaseInfo
    from megatron_eagle.config import EagleConfig
    from megatron_eagle.kernels.choice import choose_kernels
    from megatron_eagle.objective.batch import EagleBatch
    from megatron_eagle.platform import enable
    from megatron_eagle.teacher.build import base_config
    from megatron_eagle.training import builder

    assert not enable()
    choose_kernels("eager")  # a kernel has no fake
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=world, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    options = EagleConfig.of(base_checkpoint="base", aux_layers=(1, 2, 3), mask_out_of_vocab=True)
    info = BaseInfo("llama", "fake", "", VOCAB, {}, BASE_ARGS)
    flags = Namespace(
        transformer_impl="local",
        micro_batch_size=2,
        seq_length=16,
        context_parallel_size=1,
        distributed_timeout_minutes=10,
        save=None,
        hybrid_layer_pattern=None,
    )
    mask = torch.ones(2, 16)
    mask[:, 3:9] = 0
    batch = EagleBatch.build(
        torch.zeros(2, 16, dtype=torch.int64), mask, 3, parts=world if sequence_parallel else 1
    )
    kind = getattr(torch, dtype)
    with (
        mock.patch.object(builder, "get_args", return_value=flags),
        mock.patch.object(builder, "load_base"),
        fake,
    ):
        build = builder.ModelBuilder(options, info, torch.arange(0, VOCAB, 2))
        config = base_config(
            info, world, sequence_parallel=sequence_parallel, params_dtype=kind,
            bf16=kind == torch.bfloat16, calculate_per_token_loss=True,
        )  # fmt: skip
        model = build(config=config, pg_collection=groups)
        model.cuda(0)
        if kind == torch.bfloat16:
            model.bfloat16()
        with RecordedFunctions("megatron_eagle.") as functions:
            loss, sums = model(batch.to(0))
        assert functions.check_gradients() >= {
            "megatron_eagle.attention.trunk_branch",
            "megatron_eagle.loss.soft_cross_entropy",
        }
    assert {p.device for p in model.parameters()} == {DEVICE}
    return str(loss.device), loss.dtype, str(sums.device), sums.dtype


@pytest.mark.parametrize(
    ("world", "sequence_parallel", "dtype"),
    [(1, False, "float32"), (1, False, "bfloat16"), (2, False, "bfloat16"), (2, True, "bfloat16")],
)
def test_a_forward_stays_on_the_device_and_never_asks_the_host(
    world: int, sequence_parallel: bool, dtype: str
) -> None:
    (found,) = run_distributed(_train_forward, 1, world, sequence_parallel, dtype)
    assert found == ("cuda:0", torch.float32, "cuda:0", torch.float32)


def _adam_step(rank: int, _: int) -> set[torch.device]:
    fake = fake_cuda(1)
    from megatron_eagle.platform import adam as module
    from megatron_eagle.platform.adam import FusedAdam

    # torch takes step counts on the host, whose addresses its CUDA kernel would then read.
    with fake, mock.patch.object(module, "adam", wraps=module.adam) as kernel:
        weight = torch.zeros(3, 4, device=DEVICE, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        adam = FusedAdam([{"params": [weight]}, {"params": []}])
        adam.step()
    return {tensor.device for tensors in kernel.call_args.args for tensor in tensors}


def test_the_adam_steps_on_the_device() -> None:
    assert run_distributed(_adam_step, 1) == [{DEVICE}]
