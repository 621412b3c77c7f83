"""What tests share lies in tests/helpers: a test module is imported by nothing."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORT = re.compile(r"^\s*(?:from|import)\s+tests\.[\w.]*\.?test_\w+", re.MULTILINE)


def test_no_module_imports_from_a_test_module() -> None:
    files = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    assert len(files) > 50
    assert not [f.relative_to(ROOT) for f in files if IMPORT.search(f.read_text())]


def test_the_pattern_matches_such_an_import() -> None:
    assert IMPORT.search("import os\nfrom tests.unit.test_docs import problems\n")
    assert not IMPORT.search("from tests.helpers.tiny_hf import make_base\n")
