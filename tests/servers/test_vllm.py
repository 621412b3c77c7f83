"""vLLM's real engine on a CPU with tiny trained drafts of every kind: the tokens of its own greedy
decoding, and the counts of our decoding by the rule that servers count by."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.servers.conftest import Artifacts
from tests.servers.drafts import DRAFT_TOKENS, KINDS, MAX_TOKENS, Base
from tests.servers.session import Session

ENVIRONMENT = Path(os.environ.get("SERVERS_VLLM", "absent"))
if not (ENVIRONMENT / "bin" / "python").is_file():
    pytest.skip("run by `make test-servers`", allow_module_level=True)
ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = Path(os.environ.get("QUICKSTART_RUNS", ROOT / "runs" / "quickstart"))


def job(base: Base, speculative: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "base": str(base.hf),
        "speculative": speculative,
        "prompts": base.prompt_ids,
        "max_tokens": MAX_TOKENS,
        "stop_ids": base.stops,
        "requests": 4,
    }


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest,
    artifacts: Artifacts,
    session: Session,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], dict[str, Any]]:
    """The result of each kind that was chosen (`-k`), and each base's own greedy answers."""
    calls = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    chosen = {call.params["name"] for call in calls if "name" in call.params}
    kinds = {name: KINDS[name] for name in artifacts.prepare([n for n in KINDS if n in chosen])}
    names = sorted({kind.base for kind in kinds.values()})
    jobs = {("base", name): job(artifacts.bases[name], None) for name in names}
    for name, kind in kinds.items():
        speculative = {
            "method": kind.method,
            "model": str(artifacts.draft(name)[0]),
            "num_speculative_tokens": DRAFT_TOKENS,
            **kind.speculative,
        }
        jobs[("draft", name)] = job(artifacts.bases[kind.base], speculative)
    folder = tmp_path_factory.mktemp("vllm")
    results = session.serve(ENVIRONMENT, "vllm_worker.py", folder, list(jobs.values()))
    return dict(zip(jobs, results, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_vllm_serves_the_draft(
    served: dict[tuple[str, str], dict[str, Any]], artifacts: Artifacts, name: str
) -> None:
    figures = artifacts.draft(name)[1]
    result, plain = served[("draft", name)], served[("base", KINDS[name].base)]
    assert "error" not in result, result["error"]
    assert "error" not in plain, plain["error"]
    assert result["answers"] == plain["answers"]
    assert result["verifications"] == figures["verifications"]
    assert result["accepted"] == figures["server_accepted"]
    assert sum(result["accepted"]) > 0, "nothing was accepted: the comparison shows nothing"


def test_vllm_serves_the_quickstart_s_draft(
    session: Session, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What `make train` left, if it ran: all its held-out prompts."""
    if not (QUICKSTART / "eval_trained.json").is_file():
        pytest.skip("`make train` has left nothing here")
    figures = json.loads((QUICKSTART / "eval_trained.json").read_text())
    lines = (ROOT / "examples" / "quickstart" / "data" / "eval.jsonl").read_text().splitlines()
    config = json.loads((QUICKSTART / "base_hf" / "config.json").read_text())
    speculative = {
        "method": "eagle3",
        "model": str(QUICKSTART / "draft_hf"),
        "num_speculative_tokens": figures["draft_tokens"],
    }
    work = {
        "base": str(QUICKSTART / "base_hf"),
        "prompts": [json.loads(line)["prompt_ids"] for line in lines[: figures["prompts"]]],
        "max_tokens": figures["max_new_tokens"],
        "stop_ids": [config["eos_token_id"]],
        "requests": figures["prompts"],  # all together: the fewest passes over the weights
    }
    jobs = [{**work, "speculative": given} for given in (None, speculative)]
    folder = tmp_path_factory.mktemp("quickstart")
    plain, result = session.serve(ENVIRONMENT, "vllm_worker.py", folder, jobs)
    assert "error" not in result, result["error"]
    assert "error" not in plain, plain["error"]
    assert result["answers"] == plain["answers"]
    assert result["verifications"] == figures["verifications"]
    assert result["accepted"] == figures["server_accepted"]


@pytest.mark.usefixtures("served")
def test_chains_ran_past_the_ends_of_answers(artifacts: Artifacts) -> None:
    """Without such chains the two rules of counting would be the same here."""
    figures = [figures for _, figures in artifacts.drafts.values()]
    assert any(f["accepted"] != f["server_accepted"] for f in figures)
