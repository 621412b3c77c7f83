"""Bases and trained drafts, each made once for all engines, and the time that all tests have."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.servers.drafts import DRAFT_TOKENS, KINDS, MAX_TOKENS, Base, make, trained
from tests.servers.session import Session

SESSION = Session()
FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:  # the session ends what runs before this does
            item.add_marker(pytest.mark.timeout(SESSION.seconds + 60))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if SESSION.over:
        pytest.fail(f"not run: {SESSION.over}", pytrace=False)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if SESSION.spent:
        spent = [f"{name} {seconds:.0f}" for name, seconds in SESSION.spent.items()]
        terminalreporter.write_line(f"seconds, of {SESSION.seconds:g}: {', '.join(spent)}")


@dataclass
class Artifacts:
    """What was made so far, in ``folder``, by the processes of ``pool``."""

    folder: Path
    pool: Executor
    bases: dict[str, Base] = field(default_factory=dict)
    drafts: dict[str, tuple[Path, dict[str, Any]]] = field(default_factory=dict)
    failed: dict[str, Exception] = field(default_factory=dict)

    def prepare(self, names: Iterable[str]) -> list[str]:
        """Make the drafts of these kinds and their bases, several at a time. The names of those
        that came out; for the others ``draft`` raises."""
        with SESSION.stage("bases and drafts"):
            kinds = {n: KINDS[n] for n in names if n not in self.drafts and n not in self.failed}
            missing = {kind.base for kind in kinds.values()} - set(self.bases)
            bases = {
                name: self.pool.submit(make, self.folder / "bases" / name, name)
                for name in sorted(missing)
            }
            self.bases |= {name: future.result() for name, future in bases.items()}
            futures = {
                name: self.pool.submit(
                    trained, self.folder / "drafts" / name, kind, self.bases[kind.base], SESSION.end
                )
                for name, kind in kinds.items()
            }
            for name, future in futures.items():
                try:
                    self.drafts[name] = future.result()
                except Exception as error:
                    self.failed[name] = error
        return [name for name in names if name in self.drafts]

    def draft(self, name: str) -> tuple[Path, dict[str, Any]]:
        """The export of a draft of this kind, and our figures of it."""
        if name in self.failed:
            raise self.failed[name]
        return self.drafts[name]

    def job(self, name: str, engine: str) -> dict[str, Any]:
        """What a worker needs to serve a draft of this kind by the commands of its model card: the
        indented lines of the paragraph under the words ``engine``, continued ones joined.
        """
        base, (draft, _) = self.bases[KINDS[name].base], self.draft(name)
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
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artifacts]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield Artifacts(tmp_path_factory.mktemp("artifacts"), pool)


@pytest.fixture(scope="session")
def session() -> Session:
    return SESSION
