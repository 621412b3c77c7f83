"""The figures of an evaluation on a draft's model card: read, shown, and put into a card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_eagle.checkpoint.atomic import write_text
from megatron_eagle.checkpoint.directory import ACCEPTED_LENGTH_NAME
from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import naming, read_json_object, reading

CARD_NAME = "README.md"
ACCEPTED_LENGTH = "accepted length"
PER_POSITION = "accepted drafts per position"
FC = "fc.weight"


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read the figures that ``megatron-eagle eval`` wrote to ``path``.

    Raises ``UserError`` naming ``<eval>`` for a file without these figures, for figures of an
    untrained draft, and for figures of answers other than the greedy ones.
    """
    with naming("eval"), reading("eval", path):
        figures = read_json_object(path)
    if missing := _missing_figure(figures):
        raise UserError(f"<eval> {path}: {missing} is missing; did megatron-eagle eval write it?")
    if figures.get("reinitialize"):
        raise UserError(f"<eval> {path}: measured with <reinitialize>, not with trained weights")
    if figures.get("equal_to_greedy") is not True:
        raise UserError(f"<eval> {path}: its answers were not the greedy ones")
    return figures


def measured_in_training(iteration: Path) -> dict[str, Any] | None:
    """Read the figures that an evaluation while training left in directory ``iteration``.

    Returns None if there was no evaluation. Raises ``UserError`` naming a damaged file.
    """
    path = iteration / ACCEPTED_LENGTH_NAME
    if not path.is_file():
        return None
    figures = read_json_object(path)
    if missing := _missing_figure(figures):
        raise UserError(f"{path}: {missing} is missing")
    return figures


def figure_rows(evaluation: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return the rows of a card's table that say what was measured."""
    if evaluation is None:
        return [(ACCEPTED_LENGTH, "not measured (megatron-eagle eval)")]
    drafts, prompts = evaluation["draft_tokens"], evaluation["prompts"]
    shares = ", ".join(f"{share:.3f}" for share in evaluation["acceptance"])
    in_training = ", while training" if "iteration" in evaluation else ""
    return [
        (
            ACCEPTED_LENGTH,
            f"{evaluation['accepted_length']:.3f} tokens per verification, greedy, chains of "
            f"{drafts} drafts, {prompts} prompts{in_training}",
        ),
        (PER_POSITION, shares),
    ]


@dataclass(frozen=True)
class ExportedCard:
    """The model card of an exported draft, to be given the figures of an evaluation."""

    path: Path

    @classmethod
    def of(cls, export: Path, checkpoint: str | Path) -> ExportedCard:
        """Open the card in ``export``, the directory that ``checkpoint``'s draft was converted to.

        Raises ``UserError`` naming ``<card>`` for a directory without such a card, or one that was
        converted from another draft: ``fc`` is compared.
        """
        where = f"<card> {literal(str(export))}"
        card = cls(export / CARD_NAME)
        weights = export / "model.safetensors"
        if not card.path.is_file() or not weights.is_file():
            raise UserError(f"{where}: holds no draft that megatron-eagle convert wrote")
        if not any(_is_row(line, ACCEPTED_LENGTH) for line in card._lines()):
            raise UserError(f"{where}: its {CARD_NAME} has no line about the accepted length")
        key = f"draft.{FC}"
        trained = CheckpointReader.open(checkpoint).load([key])[key]
        with safe_open(str(weights), framework="pt") as file:
            exported = file.get_tensor(FC) if FC in file.keys() else torch.empty(0)  # noqa: SIM118
        if not exported.equal(trained.to(exported.dtype)):
            raise UserError(
                f"{where}: was not converted from the draft in {literal(str(checkpoint))}"
            )
        return card

    def write(self, evaluation: dict[str, Any]) -> None:
        """Put ``evaluation`` in place of the card's rows about the accepted length."""
        lines: list[str] = []
        for line in self._lines():
            if _is_row(line, ACCEPTED_LENGTH):
                lines += [f"| {name} | {value} |" for name, value in figure_rows(evaluation)]
            elif not _is_row(line, PER_POSITION):
                lines.append(line)
        write_text(self.path, "\n".join(lines) + "\n")

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines()


def _is_row(line: str, name: str) -> bool:
    return line.startswith(f"| {name} |")


def _missing_figure(figures: dict[str, Any]) -> str | None:
    """Return the first figure that is missing or of the wrong type, or None."""
    types = {"accepted_length": float, "prompts": int, "draft_tokens": int, "acceptance": list}
    return next((key for key, cls in types.items() if type(figures.get(key)) is not cls), None)
