"""Forward and backward of our draft for one micro-batch: prints one JSON line.

    python benchmarks/draft_step.py --size S
    python benchmarks/draft_step.py --hidden 1024 --heads 16 --kv-heads 8 --tp 2 --iters 5

The package's own code: EagleDraft, the unroll, the teacher's targets, the fused loss. Of the base
there is what it hands over. ``--tp`` runs gloo ranks of this machine and reports rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.given_logits import give_logits
from benchmarks.measure import measure
from benchmarks.problem import DTYPES, Problem, add_problem_flags, problem_from
from megatron_eagle.testing.collectives import CollectiveCounter

if TYPE_CHECKING:  # only the ranks import Megatron
    from megatron_eagle.model import EagleGPTModel
    from megatron_eagle.objective.batch import EagleBatch


class DraftStep:
    """The forward pass of one micro-batch on this rank."""

    def __init__(self, model: EagleGPTModel, batch: EagleBatch) -> None:
        self.model, self.batch = model, batch
        self.rows = batch.step_mask[0].sum()

    def __call__(self) -> Tensor:
        return self.model(self.batch)[0] / self.rows

    @torch.no_grad()
    def loss_per_step(self) -> list[float]:
        """Each step's mean over its own rows, without step weights."""
        from megatron_eagle.objective.metrics import MetricSums

        sums = MetricSums.unpack(self.model(self.batch)[1])
        return (sums.loss / sums.rows).tolist()


def build(problem: Problem, device: str, options: dict[str, Any]) -> tuple[DraftStep, list[Tensor]]:
    """Build the forward pass on this rank; return it and the tensors at rest."""
    from megatron_eagle.objective.batch import EagleBatch
    from tests.helpers.draft_fixture import Case, build_model
    from tests.reference.layers import ReferenceConfig

    inputs = problem.inputs()
    config = ReferenceConfig(
        hidden_size=problem.hidden,
        target_hidden_size=problem.hidden,
        intermediate_size=problem.intermediate,
        num_heads=problem.heads,
        num_kv_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        vocab_size=problem.vocab,
        draft_vocab_size=problem.draft_vocab,
        num_aux=problem.aux,
        ttt_steps=problem.ttt,
    )
    case = Case(
        config=config,
        weights=problem.weights(),
        vocab_ids=inputs.vocab_ids,
        embedding=inputs.embedding,
        output_weight=inputs.output_weight,
        aux=inputs.aux.to(device, DTYPES[problem.dtype]),
        final_hidden=inputs.final_hidden.to(device, DTYPES[problem.dtype]),
        tokens=inputs.tokens,
        loss_mask=inputs.loss_mask,
        positions=problem.positions(),
        **options,
    )
    model = build_model(case)
    to_benchmark_dtype(model, device, DTYPES[problem.dtype])
    world = model.base.tp_group.size()
    batch = EagleBatch.build(
        inputs.tokens,
        inputs.loss_mask,
        problem.ttt,
        multiple=world,
        parts=world if case.sequence_parallel else 1,
        positions=case.positions,
    ).to(device)
    base = model.base
    shared = [base.embedding_weight, base.output_weight, case.aux, case.final_hidden]
    resting = [*model.draft.parameters(), *model.draft.buffers(), *shared, batch.tokens]
    return DraftStep(model, batch), resting


def to_benchmark_dtype(model: Any, device: str, dtype: torch.dtype) -> None:
    model.to(device)
    model.draft.to(dtype)
    model.step_weights = model.step_weights.to(device)
    base = model.base
    base.embedding_weight = base.embedding_weight.to(device, dtype)
    base.output_weight = base.output_weight.to(device, dtype)


def start_megatron(rank: int, world: int, store: str) -> None:
    """Default process group and Megatron's own, tensor parallelism over all ranks."""
    from megatron_eagle import platform

    platform.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    model_parallel_cuda_manual_seed(1234)


def run_rank(rank: int, args: argparse.Namespace, store: str) -> None:
    start_megatron(rank, args.tp, store)
    from megatron_eagle.platform.compiler import compile_regions

    compile_regions(args.compile)
    problem = problem_from(args)
    options: dict[str, Any] = {
        "sequence_parallel": args.sequence_parallel,
        "recompute_modules": tuple(args.recompute),
        "loss_chunk_mib": args.loss_chunk_mib,
    }
    if args.logits_budget_mib is not None:
        options["logits_budget_mib"] = args.logits_budget_mib
    forward, resting = build(problem, args.device, options)
    if args.given_logits:
        resting.append(give_logits(forward.model, forward.batch))
    result: dict[str, Any] = measure(forward, resting, args.iters)
    with CollectiveCounter() as counter:
        forward().backward()
    result |= {"collectives": sum(counter.calls.values()), "collective_bytes": counter.bytes}
    result["loss_per_step"] = forward.loss_per_step()
    if rank == 0:
        print(json.dumps({"implementation": "ours", **result}), flush=True)
    torch.distributed.destroy_process_group()


def restart_with_recommended_environment(ranks: int) -> None:
    """malloc and OpenMP read their variables when a process starts."""
    from megatron_eagle.platform import recommended_environment

    marker = "EAGLE_BENCHMARK_STARTED"
    if marker not in os.environ:
        environment = {**recommended_environment(ranks), **os.environ, marker: "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def main(run: Callable[..., None] = run_rank) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_problem_flags(parser)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--given-logits", action="store_true", help="as the peers; one rank")
    parser.add_argument("--logits-budget-mib", type=int, help="as --eagle-logits-budget-mib")
    parser.add_argument("--loss-chunk-mib", type=int, help="as --eagle-loss-chunk-mib")
    parser.add_argument(
        "--recompute", nargs="*", default=[], help="as --recompute-modules, such as mlp"
    )
    parser.add_argument("--compile", action="store_true", help="as --eagle-compile")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--iters", type=int, default=5)
    args = parser.parse_args()
    if args.given_logits and args.tp > 1:
        parser.error("--given-logits: the logits are one rank's; leave out --tp")
    restart_with_recommended_environment(args.tp)
    with tempfile.TemporaryDirectory() as scratch:
        store = f"{scratch}/store"
        if args.tp == 1:
            run(0, args, store)
        else:
            multiprocessing.start_processes(
                run, args=(args, store), nprocs=args.tp, start_method="spawn"
            )


if __name__ == "__main__":
    main()
