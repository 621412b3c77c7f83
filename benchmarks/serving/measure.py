"""Send prompts to a running server, and add up what it answered, took and counted."""

from __future__ import annotations

import concurrent.futures
import json
import statistics
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serving.engine import Answer
from benchmarks.serving.server import Server

REQUEST_SECONDS = 900


@dataclass
class Load:
    """What a server did under one number of requests at a time.

    Attributes:
        answers: token ids of every answer.
        seconds, cpu_seconds: of each repetition, for all prompts.
        counts: the server's own counters in the first repetition.
        unlike_first: how many repetitions had other answers or counts than the first.
    """

    answers: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    unlike_first: int = 0

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all answers."""
        return sum(map(len, self.answers))

    @property
    def tokens_per_second(self) -> float:
        """Return the median over the repetitions."""
        return self.tokens / statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """Return all figures but the answers, JSON-serialisable."""
        return {
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "counts": self.counts,
            "unlike_first": self.unlike_first,
        }


def ask(server: Server, prompt: Sequence[int], max_tokens: int) -> Answer:
    """Return the greedy answer to ``prompt``."""
    path, body = server.engine.request(prompt, max_tokens)
    request = urllib.request.Request(
        f"{server.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as reply:
        return server.engine.answer(json.load(reply))


def load(
    server: Server,
    prompts: Sequence[Sequence[int]],
    *,
    at_a_time: int,
    max_tokens: int,
    repetitions: int,
) -> Load:
    """Send all ``prompts``, ``at_a_time`` together, ``repetitions`` times."""
    engine, result = server.engine, Load()
    for repetition in range(repetitions):
        before, cpu = engine.counters(server.url), server.cpu_seconds()
        start = time.perf_counter()
        pool = concurrent.futures.ThreadPoolExecutor(at_a_time)
        try:
            replies = list(pool.map(lambda prompt: ask(server, prompt, max_tokens), prompts))
        finally:  # when interrupted, the answers on their way are waited for once the server ended
            pool.shutdown(wait=False, cancel_futures=True)
        result.seconds.append(time.perf_counter() - start)
        result.cpu_seconds.append(server.cpu_seconds() - cpu)
        total = Counter(engine.counters(server.url))
        total.subtract(before)
        for reply in replies:
            total.update(reply.counts)
        answers, counts = [reply.ids for reply in replies], dict(total)
        if repetition == 0:
            result.answers, result.counts = answers, counts
        elif (answers, counts) != (result.answers, result.counts):
            result.unlike_first += 1
    return result
