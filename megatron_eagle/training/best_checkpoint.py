"""The draft with the best accepted length so far, kept beside a run's checkpoints.

``SAVE/best`` is a checkpoint directory of one iteration that holds the draft alone: every command
and ``--eagle-warm-start`` read it like any other. Megatron neither counts nor deletes it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.checkpoint.atomic import replace_dir, take_back, write_json, write_text
from megatron_eagle.checkpoint.directory import (
    ACCEPTED_LENGTH_NAME,
    MOST_DIGITS,
    TRACKER_NAME,
    iteration_directory,
    resolve_checkpoint,
)
from megatron_eagle.compat import dist_checkpointing
from megatron_eagle.errors import UserError
from megatron_eagle.user_files import read_json_object, reading, reading_file


class BestCheckpoint:
    """``accepted_length`` and ``iteration`` of the draft in ``directory``; 0 if there is none."""

    def __init__(self, directory: Path, accepted_length: float = 0.0, iteration: int = 0) -> None:
        self.directory = directory
        self.accepted_length, self.iteration = accepted_length, iteration

    @classmethod
    def open(cls, directory: Path, settings: dict[str, Any]) -> BestCheckpoint:
        """Read what earlier runs left in ``directory``.

        Raises ``UserError`` unless it was measured with ``settings``: figures of other prompts
        cannot be compared.
        """
        if not (directory / TRACKER_NAME).is_file():
            return cls(directory)
        _take_back(directory)
        with reading("save", directory):
            file = resolve_checkpoint(directory) / ACCEPTED_LENGTH_NAME
            figures = read_json_object(file)
            with reading_file(file):
                best = cls(directory, float(figures["accepted_length"]), int(figures["iteration"]))
        for name, value in settings.items():
            if figures.get(name) != value:
                raise UserError(
                    f"--save: the best draft in {directory} was measured with {name} "
                    f"{figures.get(name)}, this run has {value}; move it away, or choose another "
                    "--save"
                )
        return best

    def offer(self, figures: dict[str, Any], sharded_state_dict: Callable[[], Any]) -> bool:
        """Keep the draft if it is better than the best so far, and return whether it is.

        A collective of all ranks, which must pass equal ``figures``. Should the run die,
        ``directory`` holds a whole checkpoint: the tracker file changes by a rename, after the new
        draft is in place and before the old one is deleted. The exception is a resumed run that
        replaces a draft of the same iteration: there is an instant between two renames.
        """
        self._ask_first_rank()
        if figures["accepted_length"] <= self.accepted_length:
            return False
        self.accepted_length, self.iteration = figures["accepted_length"], figures["iteration"]
        first = torch.distributed.get_rank() == 0
        name = f"iter_{self.iteration:07d}"
        scratch = self.directory / f"{name}.partial"
        if first:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        torch.distributed.barrier()
        common = {"checkpoint_version": 3.0, "iteration": self.iteration}
        dist_checkpointing.save({**common, **sharded_state_dict()}, str(scratch))
        torch.distributed.barrier()
        if first:
            write_json(scratch / ACCEPTED_LENGTH_NAME, figures)
            self._put_in_place(scratch, name)
        torch.distributed.barrier()
        return True

    def _ask_first_rank(self) -> None:
        """Take over what the first rank knows of the best draft: a file system that lags, or a
        directory of each node's own, must not let ranks disagree on whether to save."""
        best: list[tuple[float, int]] = [(self.accepted_length, self.iteration)]
        torch.distributed.broadcast_object_list(best, src=0)
        self.accepted_length, self.iteration = best[0]

    def _put_in_place(self, scratch: Path, name: str) -> None:
        target = self.directory / name
        replace_dir(scratch, target)
        write_text(self.directory / TRACKER_NAME, str(self.iteration))
        for other in self.directory.glob("*iter_*"):  # hidden ones too, of a run that died
            if other != target:
                shutil.rmtree(other, ignore_errors=True)


def _take_back(directory: Path) -> None:
    """Bring back the draft that a run moved away to replace it, and was killed before it did."""
    iteration = (directory / TRACKER_NAME).read_text(encoding="utf-8", errors="replace").strip()
    if iteration.isascii() and iteration.isdigit():
        take_back(iteration_directory(directory, int(iteration[:MOST_DIGITS])))
