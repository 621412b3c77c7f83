"""OpenVINO GenAI with drafts that it has, converted by the commands of their model cards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.servers.conftest import Artifacts, Serve

ENVIRONMENT = Path(os.environ.get("SERVERS_OPENVINO", "absent"))
if not (ENVIRONMENT / "bin" / "python").is_file():
    pytest.skip("run by `make test-servers`", allow_module_level=True)
pytestmark = pytest.mark.timeout(900)
NAMES = ("one-layer", "own-head-size")


@pytest.fixture(scope="module")
def served(
    artifacts: Artifacts, serve: Serve, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    jobs = [artifacts.job(name, "OpenVINO GenAI, by optimum-intel") for name in NAMES]
    folder = tmp_path_factory.mktemp("openvino")
    return dict(zip(NAMES, serve(ENVIRONMENT, "openvino_worker.py", folder, jobs), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_openvino_serves_the_draft(
    served: dict[str, dict[str, Any]], artifacts: Artifacts, name: str
) -> None:
    result, figures = served[name], artifacts.draft(name)[1]
    assert "error" not in result, result["error"]
    assert result["answers"] == result["plain"]
    assert result["verifications"] == figures["verifications"]
