"""Machine-readable metrics: one JSON line per log interval (``--eagle-log-file``)."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args
from torch import Tensor

from megatron_eagle.compat import patch, require
from megatron_eagle.errors import UserError
from megatron_eagle.training.throughput import RATE, Throughput

logger = logging.getLogger("megatron_eagle")
_TRAINING_LOG = "megatron.training.training:training_log"


class MetricsLog:
    """Listens to Megatron's ``training_log``; the host reads values at the log interval only.

    A line holds ``iteration``, ``consumed_samples``, ``learning_rate``, ``grad_norm``, ``seconds``
    since the start, ``supervised_rows`` summed since the start of this run, the interval's
    ``supervised_tokens_per_second_per_gpu``, and the means over the interval of every other metric.
    Lines of --eagle-eval-prompts are of another kind: they have ``eval_accepted_length`` and no
    loss. Written by the last rank.
    """

    def __init__(self, file: str, throughput: Throughput | None = None) -> None:
        self.path, self.throughput = Path(file), throughput
        self._start = time.monotonic()
        self._interval: list[dict[str, Tensor]] = []
        self._rows = 0
        self._has_warned = False

    def attach(self) -> None:
        """Attach to Megatron's trainer; call this before ``pretrain()``.

        Raises ``UserError`` if the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("a").close()
        except OSError as error:
            raise UserError(f"--eagle-log-file {self.path}: {error.strerror}") from error
        training_log = require(_TRAINING_LOG)

        def logged(
            loss_dict: dict, totals: dict, rate: Any, iteration: int, *rest: Any, **kw: Any
        ) -> Any:
            self._record(loss_dict, rate, iteration, grad_norm=rest[3])
            return training_log(loss_dict, totals, rate, iteration, *rest, **kw)

        patch(_TRAINING_LOG, logged, f"write metrics to {self.path}")

    def _record(
        self, metrics: dict[str, Tensor], rate: Any, iteration: int, grad_norm: Any
    ) -> None:
        if not _is_last_rank():
            return
        self._interval.append(metrics)
        args = get_args()
        if iteration % args.log_interval:
            return
        sums = {key: sum(float(step[key]) for step in self._interval) for key in metrics}
        self._rows += int(sums.pop("supervised_rows"))
        line = {
            "iteration": iteration,
            "consumed_samples": args.consumed_train_samples,
            "learning_rate": rate,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "seconds": round(time.monotonic() - self._start, 3),
            "supervised_rows": self._rows,
            RATE: 0.0 if self.throughput is None else round(self.throughput.rate, 1),
            **{key: value / len(self._interval) for key, value in sums.items()},
        }
        self._interval.clear()
        self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; on other ranks than the last do nothing.

        Training is worth more than its log: what cannot be written is left out, with a warning the
        first time.
        """
        if not _is_last_rank():
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            if not self._has_warned:
                logger.warning(
                    "--eagle-log-file %s: cannot be written (%s); training goes on without the "
                    "lines that do not fit",
                    self.path,
                    error.strerror,
                )
            self._has_warned = True


def _is_last_rank() -> bool:
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
