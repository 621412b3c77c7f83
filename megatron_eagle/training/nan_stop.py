"""A NaN in training: one line, and a restart that gets past it.

Megatron looks for NaN in each rank's own gradients, before they are added up; the rank that finds
one fails alone, and the others in the middle of a collective. Its default then repeats the step,
saves, and asks for a restart with exit status 16, which ends in the same status for ever where the
step gives NaN each time. Here all ranks look at the sums, agree before the optimizer runs, stop
with the weights untouched, and note the iteration beside the checkpoints. A run that finds it noted
twice leaves it out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args

from megatron_eagle.checkpoint.atomic import write_json
from megatron_eagle.compat import patch, require
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import read_json_object, reading

_SCHEDULE = "megatron.training.training:get_forward_backward_func"
_SKIP = "megatron.training.training:dummy_train_step"
_DISABLED = "disabled"
_KINDS = ("", "infinite", "NaN")
"""Kinds of gradients: a good one, and the others, the worst last."""
FILE_NAME = "rejected_iterations.json"
TIMES = 2
"""Runs in which an iteration must give NaN before it is left out."""
MOST_LEFT_OUT = 3
"""Iterations to leave out; if more give NaN, it is not the data's fault."""


def noted_iterations(save: str | None) -> dict[int, int]:
    """Return how often each iteration noted in the directory ``save`` gave NaN.

    Raises ``UserError`` naming ``<save>`` for a damaged file.
    """
    if save is None or not (Path(save) / FILE_NAME).is_file():
        return {}
    with reading("save", save):
        content = read_json_object(Path(save) / FILE_NAME)
        return {int(iteration): int(times) for iteration, times in content.items()}


def nan_flags(argv: Sequence[str], noted: Mapping[int, int]) -> list[str]:
    """Return the flags that make a run stop at a NaN and leave out iterations that gave one
    ``TIMES`` times.

    Raises ``UserError`` where that would be more than a few.
    """
    words = [] if "--rerun-mode" in argv else ["--rerun-mode", _DISABLED]
    left_out = [str(iteration) for iteration in sorted(noted) if noted[iteration] >= TIMES]
    if "--iterations-to-skip" in argv or not left_out:
        return words
    if len(left_out) > MOST_LEFT_OUT:
        raise UserError(
            f"<save>: iterations {' '.join(left_out)} gave NaN twice, so it is the weights, not "
            f"the data. Resume an earlier checkpoint, lower <lr>, and delete {FILE_NAME} there"
        )
    return [*words, "--iterations-to-skip", *left_out]


def stop_at_nan(args: argparse.Namespace, noted: Mapping[int, int]) -> None:
    """Check every step's gradients in place of Megatron, unless ``args`` asks for its own way or
    for no check; make iterations that are left out read our batches.

    ``noted`` is what earlier runs noted. Must run before ``pretrain()``, and after the schedule was
    replaced.
    """
    patch(_SKIP, _skip, "every rank reads the micro-batches of an iteration that is left out")
    if args.rerun_mode != _DISABLED or not args.check_for_nan_in_loss_and_grad:
        return
    args.check_for_nan_in_loss_and_grad = False
    get_schedule = require(_SCHEDULE)

    def get_forward_backward_func(*rest: Any, **options: Any) -> Callable[..., Any]:
        schedule = get_schedule(*rest, **options)

        def forward_backward(**call: Any) -> Any:
            reports = schedule(**call)
            if not call.get("forward_only"):
                kind = agreed_kind(call["model"])
                if kind:
                    raise UserError(_note(kind, noted))
            return reports

        return forward_backward

    patch(_SCHEDULE, get_forward_backward_func, "all ranks agree on a NaN before the optimizer")


def agreed_kind(model: Iterable[Any]) -> str:
    """Return "NaN" or "infinite" if a gradient of the DDP-wrapped ``model`` is so on any rank, and
    else "". Call it when gradients are summed; one all-reduce of 8 bytes over all ranks."""
    largest = [
        torch.linalg.vector_norm(buffer.grad_data, ord=torch.inf).float()
        for chunk in model
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    worst = torch.stack(largest).max()  # NaN where one is NaN
    kind = 2 * worst.isnan().long() + worst.isinf().long()
    torch.distributed.all_reduce(kind, torch.distributed.ReduceOp.MAX)
    return _KINDS[int(kind)]


def _skip(iterator: Any) -> None:
    """Read the micro-batches of one iteration and drop them."""
    machine = get_rerun_state_machine()
    while machine.should_run_forward_backward(iterator):
        for _ in range(get_num_microbatches()):
            next(iterator)


def _note(kind: str, noted: Mapping[int, int]) -> str:
    """Note the iteration in ``--save``, on the first rank, and return the line to say."""
    args = get_args()
    iteration = args.curr_iteration + 1
    text = f"iteration {iteration}: the gradient is {kind}; the weights are as they were before"
    if args.save is None:
        return f"{text}. Lower <lr>, or look for bad values in the data"
    times = noted.get(iteration, 0) + 1
    content = {str(number): count for number, count in {**noted, iteration: times}.items()}
    if torch.distributed.get_rank() == 0:
        try:
            write_json(Path(args.save) / FILE_NAME, content)
        except OSError as error:
            return f"{text}. <save> {literal(args.save)} cannot be written: {error.strerror}"
    if times < TIMES:
        after = "if it is so again, the run after that leaves the iteration out"
    else:
        after = "the iteration is left out then; if more follow, lower <lr>"
    return f"{text}. Run the command again to go on from <save> {literal(args.save)}; {after}"
