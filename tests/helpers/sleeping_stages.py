"""Pipeline stages whose work lasts a given time, so that waiting can be measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class SleepingStages:
    """An observer that makes every base forward and draft step last a given time, and notes when
    things happened."""

    def __init__(self, base: float, draft: float) -> None:
        self.base, self.draft = base, draft
        self.events: list[tuple[str, int, float, float]] = []

    @contextmanager
    def __call__(self, kind: str, micro_batch: int) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if kind != "wait":
            lasts = self.draft if kind == "draft" else self.base
            time.sleep(max(0.0, started + lasts - time.perf_counter()))
        self.events.append((kind, micro_batch, started, time.perf_counter()))
