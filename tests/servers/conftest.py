"""Bases and trained drafts, each made once for all engines."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.servers.drafts import DRAFT_TOKENS, KINDS, MAX_TOKENS, Base, make, trained


@dataclass
class Artifacts:
    """What was made so far, in ``folder``."""

    folder: Path
    bases: dict[str, Base] = field(default_factory=dict)
    drafts: dict[str, tuple[Path, dict[str, Any]]] = field(default_factory=dict)

    def base(self, name: str) -> Base:
        if name not in self.bases:
            self.bases[name] = make(self.folder / "bases" / name, name)
        return self.bases[name]

    def draft(self, name: str) -> tuple[Path, dict[str, Any]]:
        """The export of a draft of this kind, and our figures of it."""
        if name not in self.drafts:
            kind = KINDS[name]
            folder = self.folder / "drafts" / name
            self.drafts[name] = trained(folder, kind, self.base(kind.base))
        return self.drafts[name]

    def job(self, name: str, engine: str) -> dict[str, Any]:
        """What a worker needs to serve a draft of this kind by the commands of its model card: the
        indented lines of the paragraph under the words ``engine``, continued ones joined.
        """
        base, (draft, _) = self.base(KINDS[name].base), self.draft(name)
        paragraph = (draft / "README.md").read_text().split(engine)[1].split("\n\n")[1]
        lines = paragraph.replace("\\\n", " ").splitlines()
        return {
            "base": str(base.hf),
            "draft": str(draft),
            "card": [line.strip() for line in lines],
            "prompts": base.prompt_ids,
            "max_tokens": MAX_TOKENS,
            "draft_tokens": DRAFT_TOKENS,
            "stop_ids": base.stops,
        }


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return Artifacts(tmp_path_factory.mktemp("artifacts"))


Serve = Callable[[Path, str, Path, list[dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def serve() -> Serve:
    """Run jobs by a worker of this folder in an engine's environment, in a process of its own."""

    def run(
        environment: Path, worker: str, folder: Path, jobs: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        (folder / "jobs.json").write_text(json.dumps(jobs))
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [
                str(environment / "bin" / "python"),
                str(Path(__file__).with_name(worker)),
                str(folder / "jobs.json"),
                str(folder / "results.json"),
            ],
            cwd=folder,
            env={
                **inherited,
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": "1",  # threads that wait for each other on a busy core take long
                "CUDA_VISIBLE_DEVICES": "",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=800,
            check=False,
        )
        results = folder / "results.json"
        assert done.returncode == 0 and results.exists(), done.stdout[-4000:]
        return list(json.loads(results.read_text()))

    return run
