"""The draft with the best accepted length so far, kept beside a run's checkpoints.

``SAVE/best`` is a checkpoint directory of one iteration that holds the draft alone: the tools and
``--eagle-warm-start`` take it like any other. Megatron neither counts nor deletes it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.checkpoint.directory import (
    ACCEPTED_LENGTH_NAME,
    TRACKER_NAME,
    resolve_checkpoint,
)
from megatron_eagle.compat import dist_checkpointing
from megatron_eagle.errors import UserError


class BestCheckpoint:
    """``accepted_length`` and ``iteration`` of the draft in ``directory``; 0 of none yet."""

    def __init__(self, directory: Path, accepted_length: float = 0.0, iteration: int = 0) -> None:
        self.directory = directory
        self.accepted_length, self.iteration = accepted_length, iteration

    @classmethod
    def open(cls, directory: Path, settings: dict[str, Any]) -> BestCheckpoint:
        """What earlier runs left in ``directory``.

        Raises ``ValueError`` unless it was measured with ``settings``: figures of other prompts
        cannot be compared.
        """
        if not (directory / TRACKER_NAME).is_file():
            return cls(directory)
        file = resolve_checkpoint(directory) / ACCEPTED_LENGTH_NAME
        try:
            figures = json.loads(file.read_text(encoding="utf-8"))
            found = cls(directory, float(figures["accepted_length"]), int(figures["iteration"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: cannot be read: {error}") from error
        for name, value in settings.items():
            if figures.get(name) != value:
                raise UserError(
                    f"--save: the best draft in {directory} was measured with {name} "
                    f"{figures.get(name)}, this run has {value}; move it away, or choose another "
                    "--save"
                )
        return found

    def offer(self, figures: dict[str, Any], sharded_state_dict: Callable[[], Any]) -> bool:
        """Keep the draft if it is better than the best so far; whether it was. A collective of all
        ranks, whose ``figures`` must be equal.

        Should the run die, ``directory`` holds a whole checkpoint: the tracker changes by a rename,
        after the new draft is there and before the old one goes. Only a draft that takes the place
        of one of the same iteration (of a resumed run) leaves an instant between two renames.
        """
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
            _write(scratch / ACCEPTED_LENGTH_NAME, json.dumps(figures, indent=1) + "\n")
            self._put_in_place(scratch, name)
        torch.distributed.barrier()
        return True

    def _put_in_place(self, scratch: Path, name: str) -> None:
        target = self.directory / name
        if target.exists():
            # A resumed run has come to the iteration of its best again: they change places.
            target.rename(self.directory / f"{name}.old")
        scratch.rename(target)
        _write(self.directory / TRACKER_NAME, str(self.iteration))
        for other in self.directory.glob("iter_*"):
            if other != target:
                shutil.rmtree(other, ignore_errors=True)


def _write(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
