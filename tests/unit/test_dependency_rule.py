"""The package's dependency rule, read from its source: an import only goes down.

the floors of :data:`FLOORS`, from the ground up.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_eagle"
OUTSIDE = {"examples", "tools", "tests", "benchmarks"}

FLOORS: tuple[tuple[str, ...], ...] = (
    ("megatron_import", "errors", "algorithms"),
    ("compat",),
    ("config", "user_files"),
    ("checkpoint",),
    ("platform",),
    ("parallel", "kernels"),
    ("attention", "loss"),
    ("layers",),
    ("teacher", "draft"),
    ("objective",),
    ("pipeline",),
    ("model",),
    ("hf",),
    ("data", "attached"),
    ("decode",),
    ("training",),
    ("cli",),
    ("__main__",),
)
"""The folders of the package, from the ground up. A file imports from its own folder and from lower
floors; folders of one floor do not know each other."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MAY_IMPORT: dict[str, set[str]] = {
    room: {other for other, number in FLOOR.items() if number < floor}
    for room, floor in FLOOR.items()
}
MAY_IMPORT["__init__"] = {"config", "attached"}  # the second when ``attach`` is asked for
MAY_IMPORT["testing"] = {"platform"}
IMPORTS_THE_TRAINER = {"training", "cli", "platform", "compat"}
"""``compat`` lends the lower floors Megatron's parser and model builder, which hold no state."""
READS_GLOBAL_STATE = {"training", "cli", "testing"}
GLOBAL_STATE = {"get_args", "parallel_state", "mpu"}


def moving_names(compat_source: str) -> set[str]:
    """The names compat.py provides: the keys of its ``_PATHS`` table."""
    for node in ast.parse(compat_source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            target = node.targets[0]
            if isinstance(target, ast.Name) and target.id == "_PATHS":
                return {ast.literal_eval(key) for key in node.value.keys if key is not None}
    raise AssertionError("compat.py has no _PATHS table")


def imported(tree: ast.Module, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import at any depth; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(origin + ([node.module] if node.module else []))
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            function, first = node.func, node.args[0]
            name = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
            is_import = name in ("import_module", "__import__")
            if is_import and isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def global_state(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of every use of Megatron's globals, imported or reached through a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            names = node.name.split(".")
        elif isinstance(node, ast.ImportFrom):
            names = (node.module or "").split(".")
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        else:
            continue
        for name in GLOBAL_STATE.intersection(names):
            yield node.lineno, name


def violations(path: str, source: str, moving: set[str]) -> list[str]:
    """What breaks the rule in one file; ``path`` is relative to the package."""
    parts = Path(path).with_suffix("").parts
    layer = parts[0]
    if layer not in MAY_IMPORT:
        return [f"{path}: {layer!r} has no place in the layer table"]
    tree = ast.parse(source)
    found = []
    for line, name in imported(tree, ["megatron_eagle", *parts[:-1]]):
        words = name.split(".")
        where = f"{path}:{line}: "
        if words[0] == "megatron_eagle":
            target = words[1] if len(words) > 1 else "megatron_eagle"
            if target != layer and target not in MAY_IMPORT[layer]:
                found.append(f"{where}{layer} imports {target}")
        elif words[0] in OUTSIDE:
            found.append(f"{where}the package imports {words[0]}")
        elif words[:2] == ["megatron", "training"]:
            if layer not in IMPORTS_THE_TRAINER:
                found.append(f"{where}{layer} imports megatron.training")
        elif words[0] == "megatron" and layer != "compat":
            if words[-1] in moving:
                found.append(f"{where}{words[-1]} must come from compat")
            elif any(word.startswith("_") for word in words):
                found.append(f"{where}the private name {name} must come from compat")
    if layer not in READS_GLOBAL_STATE:
        for line, name in global_state(tree):
            found.append(f"{path}:{line}: {layer} uses Megatron's global {name}")
    return found


def test_the_package_obeys_the_rule() -> None:
    moving = moving_names((PACKAGE / "compat.py").read_text())
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    found = [
        problem
        for file in files
        for problem in violations(file.relative_to(PACKAGE).as_posix(), file.read_text(), moving)
    ]
    assert not found, "\n" + "\n".join(found)


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which modules each one imports; ``sources`` maps paths relative to the package to text."""
    names = {path: ".".join(["megatron_eagle", *_module(path)]) for path in sources}
    known, graph = set(names.values()), {}
    for path, source in sources.items():
        package = ["megatron_eagle", *Path(path).parts[:-1]]
        imports = {name for _, name in imported(ast.parse(source), package)}
        found = {name if name in known else name.rpartition(".")[0] for name in imports}
        graph[names[path]] = (found & known) - {names[path]}
    return graph


def _module(path: str) -> list[str]:
    parts = list(Path(path).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    try:
        list(TopologicalSorter(import_graph(sources)).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_files_import_each_other_in_a_circle() -> None:
    sources = {f.relative_to(PACKAGE).as_posix(): f.read_text() for f in PACKAGE.rglob("*.py")}
    assert len(sources) > 100
    assert not circle(sources)


def test_a_circle_is_found() -> None:
    sources = {
        "a/__init__.py": "",
        "a/one.py": "from megatron_eagle.a.two import x",
        "a/two.py": "def f():\n    from megatron_eagle.b import three",
        "b/__init__.py": "",
        "b/three.py": "from ..a import one",
    }
    assert {name.removeprefix("megatron_eagle.") for name in circle(sources)} == {
        "a.one", "a.two", "b.three",
    }  # fmt: skip
    assert not circle({**sources, "b/three.py": ""})


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("draft/model.py", "from megatron_eagle.objective import a", "draft imports objective"),
        ("draft/model.py", "from megatron_eagle import teacher", "draft imports teacher"),
        ("draft/model.py", "from ..training.step import x", "draft imports training"),
        ("teacher/a.py", "def f():\n    import megatron_eagle.draft", "teacher imports draft"),
        ("parallel/a.py", "import megatron_eagle", "parallel imports megatron_eagle"),
        ("hf/a.py", "from megatron_eagle.training import step", "hf imports training"),
        ("__init__.py", "from .training import step", "__init__ imports training"),
        ("data/a.py", "import importlib\nimportlib.import_module('megatron_eagle.training')",
         "data imports training"),
        ("training/a.py", "import tools.convert_to_hf", "the package imports tools"),
        ("decode/a.py", "from megatron.training import pretrain", "imports megatron.training"),
        ("objective/a.py", "from megatron import training", "imports megatron.training"),
        ("draft/a.py", "from megatron.core import parallel_state", "global parallel_state"),
        ("draft/a.py", "from megatron.core.parallel_state import x", "global parallel_state"),
        ("decode/a.py", "import megatron.core as m\nm.parallel_state.x()", "global parallel_state"),
        ("platform/a.py", "from megatron.training import get_args", "global get_args"),
        ("draft/a.py", "from megatron.core.models import GPTModel", "must come from compat"),
        ("training/a.py", "from megatron.core.utils import _secret", "private name"),
        ("novelty/a.py", "", "no place in the layer table"),
    ],
)  # fmt: skip
def test_the_checker_catches(path: str, source: str, expected: str) -> None:
    found = violations(path, source, {"GPTModel"})
    assert len(found) == 1, found
    assert expected in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("draft/model.py", "from megatron_eagle.parallel.vocab import VocabShard"),
        ("draft/model.py", "from .layer import x"),
        ("hf/export_draft.py", "from ..draft.vocab import check_vocab_ids"),
        ("compat.py", "from megatron.core.models import GPTModel"),
        ("training/a.py", "from megatron.training import get_args"),
        ("platform/a.py", "import megatron.training.initialize"),
        ("draft/a.py", "from megatron.core.packed_seq_params import PackedSeqParams"),
    ],
)
def test_the_checker_accepts(path: str, source: str) -> None:
    assert violations(path, source, {"GPTModel"}) == []
