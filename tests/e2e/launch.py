"""Start the example as a user does, and read what it left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_eagle.platform import recommended_environment
from tests.e2e.forked import run_forked

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "pretrain_eagle.py"
TRAIN_COMMAND = ("-m", "megatron_eagle", "train")
"""What stands in place of a script to run the installed command."""
RECIPE = [
    *("--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "4"),
    *("--train-iters", "20", "--lr", "2e-3", "--min-lr", "1e-4", "--lr-decay-style", "cosine"),
    *("--log-interval", "1", "--num-workers", "0", "--seed", "7"),
    *("--make-vocab-size-divisible-by", "4"),
]


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    returncode: int
    output: str
    metrics: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def error_line(self) -> str:
        """The one line that tells a user what is wrong."""
        lines = [line for line in self.output.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.output[-3000:]
        return lines[0]


def torchrun_command(script: Path | tuple[str, ...], ranks: int, *words: object) -> list[str]:
    """What a user types to run ``script`` on ``ranks`` processes."""
    program = script if isinstance(script, tuple) else (str(script),)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(ranks), *program, *map(str, words)]


def cpu_environment(ranks: int) -> dict[str, str]:
    """The environment of ``ranks`` CPU processes of one thread each, importing this checkout."""
    return {
        **os.environ,
        **recommended_environment(ranks),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }


def launch(script: Path, ranks: int, *words: object, timeout: float = 200) -> Run:
    """Run ``script`` on ``ranks`` CPU processes, as ``torchrun`` does and faster."""
    words = tuple(map(str, words))
    return Run(*run_forked(script, ranks, words, cpu_environment(ranks), timeout))


def torchrun(
    script: Path | tuple[str, ...], ranks: int, *words: object, timeout: float = 200
) -> Run:
    """Run ``script`` on ``ranks`` CPU processes, as a user does."""
    result = subprocess.run(
        torchrun_command(script, ranks, *words),
        env=cpu_environment(ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Run(result.returncode, result.stdout)


def train(
    ranks: int,
    log: Path | None,
    *words: object,
    script: Path | tuple[str, ...] = EXAMPLE,
    launcher: Callable[..., Run] = launch,
) -> Run:
    """Train with the small recipe; ``words`` are added to it and win over it."""
    logged = () if log is None else ("--eagle-log-file", log)
    run = launcher(script, ranks, *RECIPE, *logged, *words)
    if log is None or not log.exists():
        return run
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = {line["iteration"]: line for line in lines if "loss" in line}
    return Run(run.returncode, run.output, steps)
