"""A tiny random base, imported once, and answers for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_eagle.hf.base.import_base import import_base
from tests.helpers.random_answers import write_answers
from tests.helpers.tiny_hf import make_base


@dataclass(frozen=True)
class Inputs:
    """What a training run starts from."""

    hf: Path
    base: Path
    answers: Path

    @property
    def flags(self) -> list[object]:
        return ["--eagle-base-checkpoint", self.base, "--eagle-train-data", self.answers]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    make_base(folder / "hf", "llama", num_hidden_layers=7)
    import_base(folder / "hf", folder / "base")
    write_answers(folder / "answers.jsonl")
    return Inputs(folder / "hf", folder / "base", folder / "answers.jsonl")
