"""Take over Slurm's variables: ``srun`` starts processes as ``torchrun`` does, by other names."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from megatron_eagle.errors import UserError

_NEEDED = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
_PORTS = range(20_000, 40_000)


def adopt_slurm(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables in ``environ`` from those of an ``srun`` step of several tasks.

    Nothing is changed under torchrun, whose variables are there already, nor in a batch script,
    which is one process. The first host of the step is the meeting point, at a port that depends on
    the job alone; ``MASTER_ADDR`` and ``MASTER_PORT`` win. Raises ``UserError`` for a step whose
    variables are incomplete.
    """
    tasks = several_tasks(environ)
    if tasks is None:
        return
    if missing := [name for name in _NEEDED if name not in environ]:
        raise UserError(f"srun started {tasks} tasks, but {missing[0]} is not set; use torchrun")
    environ["WORLD_SIZE"] = tasks
    environ["RANK"], environ["LOCAL_RANK"] = environ["SLURM_PROCID"], environ["SLURM_LOCALID"]
    environ.setdefault("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"]))
    job = int(environ.get("SLURM_JOB_ID", "0"))
    environ.setdefault("MASTER_PORT", str(_PORTS[job % len(_PORTS)]))


def several_tasks(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """Return the number of tasks of an ``srun`` step that torchrun did not start; None if it is
    one, or there is no step."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    return None if "WORLD_SIZE" in environ or int(tasks) == 1 else tasks


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm list of nodes, such as ``gpu[01-04,07],login1``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST {nodes!r} names no host")
    return "".join(part or "" for part in match.groups())
