"""Telling a user's mistake once from a run of several ranks."""

from __future__ import annotations

import os
import sys
import time

GRACE_SECONDS = 10.0


def report_mistake(error: BaseException) -> int:
    """Print ``error: ...`` and return the exit status 2, which the caller should end with at once.

    A launcher stops all ranks as soon as one of them ends. The first rank therefore speaks first;
    the others give it time, and speak for themselves only if the mistake was theirs alone.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        time.sleep(GRACE_SECONDS)
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2
