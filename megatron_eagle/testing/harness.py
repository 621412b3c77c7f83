"""Run a function on several gloo ranks of this machine and return what each rank returned.

A complete test module::

    import torch

    from megatron_eagle.testing import megatron_parallel, run_distributed


    def column_sum(rank: int, world_size: int, weight: torch.Tensor) -> torch.Tensor:
        groups = megatron_parallel(tp=world_size)
        part = weight.chunk(world_size, dim=1)[rank].sum(dim=1)
        torch.distributed.all_reduce(part, group=groups.tp)
        return part


    def test_a_sum_over_two_ranks() -> None:
        weight = torch.ones(3, 4)
        for result in run_distributed(column_sum, 2, weight):
            assert result.tolist() == [4.0, 4.0, 4.0]

The function must be at module level, since ranks import it by name. Ranks are fresh processes
without CUDA, forked from one server that has imported torch and Megatron once, so that a run after
the first one starts in well under a second.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

PRELOADED = [
    "torch",
    "megatron_eagle.model",  # first: it imports Megatron without PyTorch's compiler
    "megatron.core.models.gpt",
    "megatron.training.training",
    "megatron.core.tokenizers.text",  # a trainer asks for it, and transformers comes with it
]
"""Modules that the server imports once, before it forks a rank."""

RANK_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # Megatron's jit_fuser would compile for seconds
}
"""Environment variables of every rank."""


class RankError(AssertionError):
    """Failure of a rank that raised or died, with its number and its traceback."""


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on every rank of a fresh gloo process group.

    Args:
        fn: a module-level function; a rank has one thread and its default group is initialised.
        world_size: the number of ranks.
        args: picklable arguments, copied to every rank, tensors included.
        timeout: seconds for all ranks together.

    Returns:
        The results in rank order; they must be picklable.

    Raises:
        RankError: a rank raised or died; the others are stopped at once.
        TimeoutError: the time is over; the message has the stack of every rank still running.
    """
    call = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stop:
        connections: dict[Any, int] = {}
        for rank in range(world_size):
            parent_end, rank_end = multiprocessing.Pipe()
            stop.callback(parent_end.close)
            process = start_rank(_rank_main, rank, world_size, call, rank_end, scratch, timeout)
            stop.callback(stop_rank, process)
            rank_end.close()
            connections[parent_end] = rank
        results = _collect(connections, timeout, Path(scratch))
    return [results[rank] for rank in range(world_size)]


def start_rank(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Run ``target(*args)`` in a process forked from the server.

    It leads a process group of its own, which ``stop_rank`` ends as a whole.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_as_leader, args=(target, *args))
    with mock.patch.dict(os.environ, RANK_ENVIRONMENT):  # the first rank starts the server
        process.start()
    return process


def _as_leader(target: Callable[..., None], *args: Any) -> None:
    os.setsid()
    target(*args)


def stop_rank(process: BaseProcess) -> None:
    """End a rank and the processes it started: Megatron's checkpoint writers outlive their rank."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):  # it may not lead a process group yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def megatron_parallel(
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    ep: int = 1,
    vpp: int | None = None,
    etp: int | None = None,
    seed: int = 1234,
) -> Any:
    """Set up Megatron inside a rank: the CPU platform, process groups, and random generators.

    Collective: every rank must call it. Sequence parallelism has no group of its own: set
    ``sequence_parallel`` in the model's config.

    Args:
        tp, pp, cp, ep: sizes of the tensor, pipeline, context and expert parallel groups; the rest
            of the world is data parallel.
        etp: ranks that share an expert; all of the tensor parallel group by default.
        vpp: virtual pipeline stages of each rank.
        seed: base of the model-parallel seeds; the same on every rank.

    Returns:
        Megatron's ``ProcessGroupCollection``.
    """
    from megatron_eagle.platform import enable

    assert enable(), "ranks run without CUDA"
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def _rank_main(
    rank: int, world_size: int, call: bytes, parent: Connection, scratch: str, timeout: float
) -> None:
    """Join the process group, call the function, and send (succeeded, result) to the parent."""
    torch.set_num_threads(1)
    with open(_stack_file(Path(scratch), rank), "w") as stacks:
        faulthandler.dump_traceback_later(timeout, file=stacks)
        try:
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{scratch}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout + 30),  # the parent's timeout comes first
            )
            fn, args = pickle.loads(call)
            answer = pickle.dumps((True, fn(rank, world_size, *args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        finally:
            faulthandler.cancel_dump_traceback_later()
    parent.send_bytes(answer)
    # Stay until the parent has everything: if this rank ended now, the others would raise "closed
    # by peer", which would hide the first error.
    with contextlib.suppress(EOFError, OSError):
        parent.recv_bytes()
    os.killpg(0, signal.SIGKILL)  # the parent is gone without having stopped this rank


def _collect(pending: dict[Any, int], timeout: float, scratch: Path) -> dict[int, Any]:
    """Receive the results of ``pending`` (connection -> rank), or raise the first error."""
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout + 2.0  # ranks write their stacks at `timeout`
    pending = dict(pending)
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(_describe_hang(sorted(pending.values()), timeout, scratch))
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = pending.pop(connection)
            try:
                succeeded, result = pickle.loads(connection.recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} died without an exception") from None
            if not succeeded:
                raise RankError(f"rank {rank} raised\n{result}")
            results[rank] = result
    return results


def _describe_hang(ranks: list[int], timeout: float, scratch: Path) -> str:
    files = [_stack_file(scratch, rank) for rank in ranks]
    stacks = [f"{file.name}:\n{file.read_text()}" for file in files if file.exists()]
    return f"ranks {ranks} still running after {timeout:g} s\n" + "\n".join(stacks)


def _stack_file(scratch: Path, rank: int) -> Path:
    return scratch / f"stack of rank {rank}"
