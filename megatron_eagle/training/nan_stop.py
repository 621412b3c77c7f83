"""A NaN in training: one line, and a restart that gets past it.

Megatron looks for NaN in every gradient before ranks exchange them. Its default then repeats the
step, saves, and asks for a restart with exit status 16, which ends in the same status for ever
where the step gives NaN each time. Here it stops at once, before the weights are touched, and notes
the iteration beside the checkpoints. A run that finds it noted twice leaves it out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args

from megatron_eagle.checkpoint.atomic import write_json
from megatron_eagle.compat import patch, require
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import read_json_object, reading

_STEP = "megatron.training.training:train_step"
_SKIP = "megatron.training.training:dummy_train_step"
_REJECTED = "Unexpected result"
"""Words of Megatron's message on a NaN or infinite gradient (rerun_state_machine.py)."""
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


def nan_flags(argv: Sequence[str], noted: Mapping[int, int], stages: int) -> list[str]:
    """Return the flags that make Megatron stop at a NaN and leave out iterations that gave one
    ``TIMES`` times. With pipeline ``stages`` none is left out: the base is ahead in the data.

    Raises ``UserError`` where that would be more than a few.
    """
    words = [] if "--rerun-mode" in argv else ["--rerun-mode", "disabled"]
    left_out = [str(iteration) for iteration in sorted(noted) if noted[iteration] >= TIMES]
    if stages > 1 or "--iterations-to-skip" in argv or not left_out:
        return words
    if len(left_out) > MOST_LEFT_OUT:
        raise UserError(
            f"<save>: iterations {' '.join(left_out)} gave NaN twice, so it is the weights, not "
            f"the data. Resume an earlier checkpoint, lower <lr>, and delete {FILE_NAME} there"
        )
    return [*words, "--iterations-to-skip", *left_out]


def stop_at_nan(noted: Mapping[int, int]) -> None:
    """Make a rejected gradient one line, and iterations that are left out read our batches.

    ``noted`` is what earlier runs noted. Must run before ``pretrain()``.
    """
    step = require(_STEP)

    @functools.wraps(step)
    def train_step(*rest: Any, **options: Any) -> Any:
        try:
            return step(*rest, **options)
        except RuntimeError as error:
            if _REJECTED not in str(error):
                raise
            kind = "NaN" if "NaN" in str(error) else "infinite"
            raise UserError(_note(kind, noted)) from error

    patch(_STEP, train_step, "say in one line that a gradient is NaN")
    patch(_SKIP, _skip, "every rank reads the micro-batches of an iteration that is left out")


def _skip(iterator: Any) -> None:
    """Read the micro-batches of one iteration and drop them."""
    machine = get_rerun_state_machine()
    while machine.should_run_forward_backward(iterator):
        for _ in range(get_num_microbatches()):
            next(iterator)


def _note(kind: str, noted: Mapping[int, int]) -> str:
    """Note the iteration in ``--save``, on every rank the same, and return the line to say."""
    args = get_args()
    iteration = args.curr_iteration + 1
    text = f"iteration {iteration}: the gradient is {kind}; the weights are as they were before"
    if args.save is None:
        return f"{text}. Lower <lr>, or look for bad values in the data"
    times = noted.get(iteration, 0) + 1
    content = {str(number): count for number, count in {**noted, iteration: times}.items()}
    write_json(Path(args.save) / FILE_NAME, content)
    if args.pipeline_model_parallel_size > 1:
        after = "if it is so again, lower <lr> or resume an earlier checkpoint"
    elif times < TIMES:
        after = "if it is so again, the run after that leaves the iteration out"
    else:
        after = "the iteration is left out then; if more follow, lower <lr>"
    return f"{text}. Run the command again to go on from <save> {literal(args.save)}; {after}"
