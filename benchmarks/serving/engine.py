"""Engine: how a server is started, asked and counted, in one object per kind of server."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

MODEL_LENGTH = 1024
NAME = "base"


@dataclass(frozen=True)
class Draft:
    """A converted draft: its directory, the server's name of its method, how many tokens it drafts
    and whether all at once (P-EAGLE)."""

    directory: Path
    method: str
    tokens: int
    parallel: bool = False


@dataclass(frozen=True)
class Setting:
    """What a server is started with.

    Attributes:
        python: interpreter of the engine's environment.
        base: Hugging Face directory of the base.
        draft: None serves the base alone.
        device: ``cpu`` or ``cuda``.
        dtype: of weights and activations.
        requests: how many are decoded together at most.
    """

    python: Path
    base: Path
    draft: Draft | None
    device: str
    dtype: str
    requests: int


@dataclass(frozen=True)
class Answer:
    """The ids of a greedy answer, and the counts that came with it, if the engine sends them."""

    ids: list[int]
    counts: dict[str, int] = field(default_factory=dict)


class Engine(ABC):
    """An engine with a setting: how it is started on loopback, asked and counted.

    Counts are called ``verifications`` and ``accepted_0``, ``accepted_1``, ... per position of the
    chain. Those of a server are the sum of :meth:`counters` and of all answers.
    """

    title: ClassVar[str]

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @classmethod
    def refusal(cls, *, device: str, method: str, parallel: bool) -> str | None:
        """Return why the engine cannot serve such a draft there, naming the flag, or None."""
        return None

    @abstractmethod
    def command(self, port: int) -> list[str]:
        """Return the words that start the server."""

    @abstractmethod
    def request(self, prompt: Sequence[int], max_tokens: int) -> tuple[str, dict[str, Any]]:
        """Return path and JSON body that ask for the greedy answer to ``prompt``."""

    @abstractmethod
    def answer(self, reply: dict[str, Any]) -> Answer:
        """Return what the reply to :meth:`request` says."""

    def counters(self, url: str) -> dict[str, int]:
        """Return the counts since the start of the server at ``url`` that are in no answer."""
        return {}

    def environment(self) -> dict[str, str]:
        """Return the server's environment variables."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")}
        return {**kept, "HF_HUB_OFFLINE": "1"}
