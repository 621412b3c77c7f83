"""OpenVINO GenAI with drafts that it has, converted by the commands of their model cards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.servers.conftest import Artifacts
from tests.servers.session import Session

ENVIRONMENT = Path(os.environ.get("SERVERS_OPENVINO", "absent"))
if not (ENVIRONMENT / "bin" / "python").is_file():
    pytest.skip("run by `make test-servers`", allow_module_level=True)
NAMES = ("one-layer", "own-head-size")


@pytest.fixture(scope="module")
def served(
    artifacts: Artifacts, session: Session, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    names = artifacts.prepare(NAMES)
    jobs = [artifacts.job(name, "OpenVINO GenAI, by optimum-intel") for name in names]
    folder = tmp_path_factory.mktemp("openvino")
    results = session.serve(ENVIRONMENT, "openvino_worker.py", folder, jobs)
    return dict(zip(names, results, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_openvino_serves_the_draft(
    served: dict[str, dict[str, Any]], artifacts: Artifacts, name: str
) -> None:
    figures = artifacts.draft(name)[1]
    result = served[name]
    assert "error" not in result, result["error"]
    assert result["answers"] == result["plain"]
    assert result["verifications"] == figures["verifications"]
