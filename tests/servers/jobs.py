"""What every worker of this folder does in its engine's environment: one job after the other."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]


def work(run: Callable[[Job, Path], dict[str, Any]]) -> int:
    """Call ``run`` with each job of the file ``argv[1]`` and a folder of its own.

    Writes what it returned, or the traceback under ``error``, to the file ``argv[2]`` after every
    job: a process that dies leaves the results before it.
    """
    jobs, results = Path(sys.argv[1]), Path(sys.argv[2])
    done = []
    for number, job in enumerate(json.loads(jobs.read_text())):
        folder = results.parent / f"job_{number}"
        folder.mkdir()
        try:
            done.append(run(job, folder))
        except Exception:
            done.append({"error": traceback.format_exc()[-4000:]})
        written = results.with_suffix(".new")
        written.write_text(json.dumps(done))
        written.replace(results)
    return 0
