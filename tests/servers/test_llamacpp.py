"""llama.cpp's server with drafts that it has, converted by the commands of their model cards."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.servers.conftest import Artifacts
from tests.servers.drafts import KINDS, VOCABULARY, Base
from tests.servers.session import Session

ENVIRONMENT = Path(os.environ.get("SERVERS_LLAMACPP", "absent"))
if not (ENVIRONMENT / "bin" / "python").is_file():
    pytest.skip("run by `make test-servers`", allow_module_level=True)
NAMES = ("one-layer", "own-head-size", "llama3-rope")


def unused(base: Base) -> int:
    """The first token that is in none of the base's answers."""
    answers = [json.loads(line)["answer_ids"] for line in base.answers.read_text().splitlines()]
    return min(set(range(VOCABULARY)) - {token for answer in answers for token in answer})


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest,
    artifacts: Artifacts,
    session: Session,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """The result of each kind that was chosen (`-k`)."""
    calls = [item.callspec for item in request.session.items if item.path == request.path]
    names = artifacts.prepare([call.params["name"] for call in calls])
    jobs = [
        {
            **artifacts.job(name, "llama.cpp, by its own converter"),
            "unused_id": unused(artifacts.bases[KINDS[name].base]),
        }
        for name in names
    ]
    folder = tmp_path_factory.mktemp("llamacpp")
    results = session.serve(ENVIRONMENT, "llamacpp_worker.py", folder, jobs)
    return dict(zip(names, results, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_llamacpp_serves_the_draft(
    served: dict[str, dict[str, Any]], artifacts: Artifacts, name: str
) -> None:
    figures = artifacts.draft(name)[1]
    result = served[name]
    assert "error" not in result, result["error"]
    assert result["answers"] == result["plain"]
    assert result["verifications"] == figures["verifications"]
    assert result["accepted"] == figures["server_accepted"]
    assert sum(result["accepted"]) > 0, "nothing was accepted: the comparison shows nothing"
