"""Megatron's names and the patches of Megatron: one table, one marker, one log line each."""

from __future__ import annotations

import ast
import functools
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_eagle import compat
from megatron_eagle.testing.harness import run_distributed

HELD_ANYWAY = {
    ("megatron.core.transformer.moe.moe_utils", "maybe_move_tensor_to_cpu"),  # where it is defined
    ("megatron.training", "initialize_megatron"),  # for callers that pass allow_no_cuda themselves
    ("megatron.training.initialize", "initialize_megatron"),
}
"""Names under which Megatron still has an object that ``enable`` replaced elsewhere."""


def test_editors_and_the_program_find_the_same_names() -> None:
    """The imports for type checkers and the table of lazy imports name the same paths."""
    tree = ast.parse(Path(compat.__file__).read_text())
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    imported = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        imported |= {
            alias.asname or alias.name: f"{statement.module}:{alias.name}"
            for alias in statement.names
        }
    assert imported == compat._PATHS


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        compat.no_such_name  # noqa: B018


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module ``patched_module`` with a function, a static method and two numbers."""

    class Holder:
        @staticmethod
        def method(x: int) -> int:
            return x

    made = types.ModuleType("patched_module")
    vars(made).update(function=lambda x: x, Holder=Holder, limit=1, switch=False)
    monkeypatch.setitem(sys.modules, "patched_module", made)
    return made


def _plus_one(path: str) -> Callable[[int], int]:
    original = compat.require(path)

    @functools.wraps(original)
    def plus_one(x: int) -> int:
        return original(x) + 1

    return plus_one


def _lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert {(record.name, record.levelname) for record in caplog.records} <= {
        ("megatron_eagle", "INFO")
    }
    return [record.getMessage() for record in caplog.records]


def test_patching_twice_leaves_one_wrapper_and_one_log_line(
    module: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path, before = "patched_module:function", module.function
    with caplog.at_level(logging.INFO, "megatron_eagle"):
        for _ in range(2):
            compat.patch(path, _plus_one(path), "counting")
    assert module.function(1) == 2
    assert compat.patches_of(module.function) == (compat.Patch("counting", before),)
    assert _lines(caplog) == [f"patched {path}: counting"]
    # Another reason is another patch; then both are known, and neither is made again.
    for _ in range(2):
        compat.patch(path, _plus_one(path), "counting further")
        compat.patch(path, _plus_one(path), "counting")
    assert module.function(1) == 3
    assert [made.why for made in compat.patches_of(module.function)] == [
        "counting",
        "counting further",
    ]


def test_a_static_method_carries_the_marker(module: Any) -> None:
    path = "patched_module:Holder.method"
    for _ in range(2):
        compat.patch(path, staticmethod(_plus_one(path)), "counting")
    assert module.Holder.method(1) == module.Holder().method(1) == 2
    assert len(compat.patches_of(module.Holder.method)) == 1


def test_several_patches_are_one_log_line_and_numbers_are_set(
    module: Any, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"patched_module:limit": 2, "patched_module:switch": False}
    with caplog.at_level(logging.INFO, "megatron_eagle"):
        for _ in range(2):
            compat.patch_all(values | {"patched_module:function": abs_of}, "no limit")
    assert (module.limit, module.switch, module.function) == (2, False, abs_of)
    assert _lines(caplog) == ["patched patched_module:limit, patched_module:function: no limit"]


def abs_of(x: int) -> int:
    return abs(x)


def _attach_twice(rank: int, world_size: int, folder: str) -> list[str]:
    from megatron_eagle.training.metrics_log import MetricsLog

    trainer = "megatron.training.training:training_log"
    calls: list[str] = []
    with (
        mock.patch("megatron.training.training.training_log", lambda *_: calls.append("Megatron")),
        mock.patch.object(MetricsLog, "_record", lambda *_, **__: calls.append("log")),
    ):
        log = MetricsLog(f"{folder}/metrics.jsonl")
        log.attach()
        log.attach()
        compat.require(trainer)({}, {}, 0.1, 1, *[None] * 4)
    return calls


def test_attaching_a_metrics_log_twice_records_once(tmp_path: Path) -> None:
    assert run_distributed(_attach_twice, 1, str(tmp_path)) == [["log", "Megatron"]]


def _patch_everything(rank: int, world_size: int) -> tuple[list[str], set[tuple[str, str]]]:
    """Return the log lines of enabling twice, and the names under which Megatron's modules, which
    were imported before, hold an object that was replaced."""
    from megatron_eagle.platform import enable

    logger, lines = logging.getLogger("megatron_eagle"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record)  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    enable()
    enable()
    paths = [path for record in lines for path in record.args[0].split(", ")]
    made = [patch for path in paths for patch in compat.patches_of(compat.require(path))]
    replaced = {id(patch.original) for patch in made}
    held = {
        (name, attribute)
        for name, module in list(sys.modules.items())
        if name.startswith("megatron.")
        for owner in (module, *(x for x in vars(module).values() if isinstance(x, type)))
        for attribute, value in list(vars(owner).items())
        if id(value) in replaced
    }
    return [record.getMessage() for record in lines], held


def test_it_does_not_matter_whether_megatron_is_imported_before() -> None:
    """No name in Megatron's modules still stands for what ``enable`` replaces, so that they work as
    if they had been imported afterwards; and each patch is logged once, with its reason."""
    ((lines, held),) = run_distributed(_patch_everything, 1)
    assert held == HELD_ANYWAY
    assert len(lines) == len(set(lines))
    for path, why in (
        ("megatron.core.optimizer:Adam", "an Adam whose state can be loaded again"),
        ("torch:empty", "a CUDA device means the CPU"),
        ("megatron.training.training:initialize_megatron", "pretrain() without a CUDA device"),
    ):
        (line,) = (line for line in lines if f"{path}," in line or f"{path}:" in line)
        assert line.startswith("patched ") and line.endswith(f": {why}")
