"""Find the arguments of the model in a checkpoint that Megatron-LM or Megatron-Bridge saved."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.native.bridge import FILE, bridge_args
from megatron_eagle.checkpoint.native.objects import read_common_state
from megatron_eagle.errors import UserError, literal


@dataclass(frozen=True)
class SavedArguments:
    """Arguments of a trained model.

    Attributes:
        args: by the names of Megatron's parser, in the release that saved them.
        source: the file they come from, for error messages.
        trainer: who saved them: Megatron-LM or Megatron-Bridge.
        iteration: of the training; None if unknown.
    """

    args: dict[str, Any]
    source: str
    trainer: str
    iteration: int | None


def read_arguments(directory: Path) -> SavedArguments:
    """Read the arguments in the iteration ``directory``.

    Raises ``UserError`` naming the directory if there are none.
    """
    common = read_common_state(directory) or {}
    iteration = common.get("iteration")
    iteration = iteration if type(iteration) is int else None
    args = common.get("args")
    if isinstance(args, Namespace):
        return SavedArguments(dict(vars(args)), literal(directory), "Megatron-LM", iteration)
    path = directory / FILE
    if path.is_file():
        return SavedArguments(bridge_args(path), literal(path), "Megatron-Bridge", iteration)
    raise UserError(
        f"{literal(directory)}: holds no arguments of a model, neither Megatron-LM's nor "
        f"Megatron-Bridge's {FILE}; <base_description> can describe it"
    )
