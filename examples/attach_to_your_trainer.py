"""Train a GPT and its draft together, in a small Megatron loop that is not this project's.

    torchrun --nproc-per-node 2 examples/attach_to_your_trainer.py --tensor-parallel 2

The loop is one that anybody would write with Megatron-Core: a GPT over the bytes of this
repository's documents. A draft adds the ten lines that end in ``# draft``, and its sums travel with
the reports of the model's own loss. It runs on a CPU, too. With ``--save DIR`` the draft is saved,
and ``megatron-eagle convert --load DIR --output draft_hf`` makes its Hugging Face files.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor

import megatron_eagle  # draft
from megatron_eagle import platform

VOCABULARY = 256  # bytes
SPEC = megatron_eagle.DraftSpec(aux_layers=(0, 1, 2))
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def main() -> None:
    args = parse_arguments()
    start_ranks(args.tensor_parallel)
    gpt = build_model(args)
    model = in_ddp(gpt.config, gpt)
    optimizer = make_optimizer(model, args)
    attached = megatron_eagle.attach(model, SPEC, vocab_size=VOCABULARY)  # draft
    draft = in_ddp(attached.config, attached.module)  # draft
    draft_optimizer = make_optimizer(draft, args)  # draft

    def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        tokens, labels, loss_mask, position_ids = next(batches)
        losses = model(tokens, position_ids, None, labels=labels)
        draft_loss, draft_sums = attached.loss(loss_mask)  # draft
        draft_loss.backward()  # draft
        return losses, partial(loss_of, loss_mask, draft_sums)

    batches = read_batches(args)
    forward_backward = get_forward_backward_func()
    for iteration in range(1, args.iterations + 1):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        draft.zero_grad_buffer()  # draft
        draft_optimizer.zero_grad()  # draft
        reports = forward_backward(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[model],
            num_microbatches=args.micro_batches,
            seq_length=args.sequence_length,
            micro_batch_size=args.micro_batch_size,
        )
        metrics = attached.finish_step(draft, [report["draft"] for report in reports])  # draft
        optimizer.step()
        draft_optimizer.step()  # draft
        if iteration in (1, args.iterations) or iteration % args.log_interval == 0:
            log(iteration, reports, metrics)
    if args.save is not None:
        save(attached, args.save, args.iterations)


def in_ddp(config: TransformerConfig, module: torch.nn.Module) -> DistributedDataParallel:
    return DistributedDataParallel(config, DistributedDataParallelConfig(), module)


def make_optimizer(model: DistributedDataParallel, args: argparse.Namespace) -> Any:
    return get_megatron_optimizer(OptimizerConfig(lr=args.lr, clip_grad=1.0), [model])


def loss_of(loss_mask: Tensor, draft_sums: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Return the model's loss as a sum over tokens, their number, and what is logged."""
    loss, tokens = (losses * loss_mask).sum(), loss_mask.sum().int()
    return loss, tokens, {"model": torch.stack([loss.detach(), tokens]), "draft": draft_sums}


def build_model(args: argparse.Namespace) -> GPTModel:
    on_cpu = not torch.cuda.is_available()
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=192,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=args.tensor_parallel,
        sequence_parallel=args.tensor_parallel > 1,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        use_cpu_initialization=on_cpu,
        perform_initialization=True,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCABULARY,
        max_sequence_length=args.sequence_length,
        position_embedding_type="rope",
    )
    return gpt if on_cpu else gpt.cuda()


def read_batches(args: argparse.Namespace) -> Iterator[Batch]:
    """Yield micro-batches of random pieces of the documents, others on each data-parallel rank."""
    files = sorted((Path(__file__).resolve().parents[1] / "docs").rglob("*.md"))
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    length, device = args.sequence_length, torch.cuda.current_device()
    while True:
        starts = torch.randint(
            len(text) - length - 1, (args.micro_batch_size,), generator=generator
        )
        pieces = torch.stack([text[start : start + length + 1] for start in starts.tolist()])
        pieces = pieces.long().to(device)
        loss_mask = torch.ones(pieces[:, 1:].shape, device=device)
        position_ids = torch.arange(length, device=device).expand(len(pieces), -1)
        yield pieces[:, :-1], pieces[:, 1:], loss_mask, position_ids


def start_ranks(tensor_parallel: int) -> None:
    platform.enable()  # on a machine without CUDA, Megatron runs on its CPU
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)


def log(iteration: int, reports: list[dict[str, Tensor]], metrics: dict[str, Tensor]) -> None:
    """Print the model's loss on this rank's tokens and the draft's over all ranks."""
    loss, tokens = torch.stack([report["model"] for report in reports]).sum(0).tolist()
    if torch.distributed.get_rank() == 0:
        print(
            f"iteration {iteration}: model loss {loss / tokens:.3f}, draft loss "
            f"{float(metrics['loss']):.3f}, draft accuracy {float(metrics['accuracy_0']):.3f}",
            flush=True,
        )


def save(attached: Any, folder: Path, iteration: int) -> None:
    """Save the draft as Megatron's own trainer saves a model."""
    directory = folder / f"iter_{iteration:07d}"
    directory.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(attached.module.sharded_state_dict(), str(directory))
    if torch.distributed.get_rank() == 0:
        (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--log-interval", type=int, default=20)
    parser.add_argument("--save", type=Path, metavar="DIR")
    return parser.parse_args()


if __name__ == "__main__":
    main()
