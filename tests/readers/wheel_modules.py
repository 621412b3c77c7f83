"""Import single files of a package out of its unpacked wheel, with stand-ins for what they import.

A server's model file needs its kernels, its distributed state and its configuration classes, which
cannot be imported on a CPU. ``REAL`` modules are executed as they are in the wheel; ``stand_ins``
give the attributes a test provides; every other module of the package is empty, and each name
taken from it is a class without content.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar


class _Empty(type):
    """A class whose unknown attributes are empty classes; its subclasses are ordinary ones."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") or not cls.__dict__.get("empty"):
            raise AttributeError(name)
        return empty_class(name)

    def __getitem__(cls, item: Any) -> Any:
        return cls


def empty_class(name: str) -> type:
    return _Empty(name, (), {"empty": True, "__init__": lambda self, *args, **kwargs: None})


class _EmptyModule(ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return empty_class(name)


class WheelModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers imports of ``package`` and everything below it."""

    def __init__(
        self,
        wheel: Path,
        package: str,
        real: Collection[str],
        stand_ins: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.wheel, self.package, self.real, self.stand_ins = wheel, package, real, stand_ins

    def install(self) -> None:
        assert self.package not in sys.modules, f"{self.package} is imported already"
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.package and not name.startswith(f"{self.package}."):
            return None
        if name in self.real:
            file = self.wheel.joinpath(*name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        for name, value in self.stand_ins.get(module.__name__, {}).items():
            setattr(module, name, value)
