"""A NaN in training: one line, and a restart that gets past it.

Megatron looks for NaN in every gradient before ranks exchange them. Its default then repeats the
step, saves, and asks for a restart with exit status 16, which ends in the same status for ever
where the step gives NaN each time. Here it stops at once, before the weights are touched. Megatron
notes the iteration in a file, and leaves it out of the run that finds it there twice.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args

from megatron_eagle.compat import patch, require
from megatron_eagle.errors import UserError, literal

_STEP = "megatron.training.training:train_step"
_SKIP = "megatron.training.training:dummy_train_step"
_REJECTED = "Unexpected result"
"""First words of Megatron's message on a NaN or infinite gradient (rerun_state_machine.py)."""
FILE_NAME = "rejected_iterations.txt"


def nan_flags(argv: Sequence[str], save: str | None, stages: int) -> list[str]:
    """Return the flags that make Megatron stop at a NaN, and note it if there is a ``save``.

    With pipeline ``stages`` nothing is left out: the base is already ahead in the data.
    """
    if "--rerun-mode" in argv:
        return []
    words = ["--rerun-mode", "disabled"]
    if save is not None and stages == 1:
        words += ["--result-rejected-tracker-filename", str(Path(save) / FILE_NAME)]
    return words


def stop_at_nan() -> None:
    """Make a rejected gradient one line, and iterations that are left out read our batches.

    Must run before ``pretrain()``.
    """
    step = require(_STEP)

    @functools.wraps(step)
    def train_step(*rest: Any, **options: Any) -> Any:
        try:
            return step(*rest, **options)
        except RuntimeError as error:
            if _REJECTED not in str(error):
                raise
            raise UserError(_words(str(error))) from error

    patch(_STEP, train_step, "say in one line that a gradient is NaN")
    patch(_SKIP, _skip, "every rank reads the micro-batches of an iteration that is left out")


def _skip(iterator: Any) -> None:
    """Read the micro-batches of one iteration and drop them."""
    machine = get_rerun_state_machine()
    while machine.should_run_forward_backward(iterator):
        for _ in range(get_num_microbatches()):
            next(iterator)


def _words(message: str) -> str:
    args = get_args()
    kind = "NaN" if "nan" in message.lower() else "infinite"
    text = f"iteration {args.curr_iteration + 1}: the gradient is {kind}; nothing of it was kept"
    if args.save is None:
        return f"{text}. Lower <lr>, or look for bad values in the data"
    tracker = args.result_rejected_tracker_filename
    if tracker is None:
        after = "to leave it out, give --iterations-to-skip"
    else:
        after = f"if it happens twice, the next run leaves the iteration out ({literal(tracker)})"
    return (
        f"{text}. Run the command again to go on from the last checkpoint in <save> "
        f"{literal(args.save)}; {after}. If more follow, lower <lr> or resume an earlier checkpoint"
    )
