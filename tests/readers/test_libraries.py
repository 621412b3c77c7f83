"""What SpecForge and speculators compute from an exported draft: prefill and three steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.readers import library_readers
from tests.readers.drafts import DRAFTS, sample

TOLERANCE = 2e-4
if importlib.util.find_spec("specforge") is None:
    pytest.skip("run by `make test-readers`", allow_module_level=True)
library_readers.install()
# SpecForge has one layer and three captured ones, and feeds back the state before the norm.
SPECFORGE = ["one-layer", "whole-vocabulary", "llama3-rope", "linear-rope"]


@pytest.mark.parametrize("name", SPECFORGE)
def test_specforge_gives_the_draft_s_own_logits(tmp_path: Path, name: str) -> None:
    given = sample(tmp_path, name, "hf")
    assert not isinstance(given, str), given
    found = library_readers.specforge_logits(given)
    assert (found - given.logits).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "name", [name for name in DRAFTS if not name.startswith(("eagle1", "mla"))]
)
def test_speculators_give_the_draft_s_own_logits(tmp_path: Path, name: str) -> None:
    given = sample(tmp_path, name, "speculators")
    assert not isinstance(given, str), given
    found = library_readers.speculators_logits(given)
    assert (found - given.logits).abs().max() < TOLERANCE
