"""The quality study's results: results.json, a Markdown table, and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality_variants import Group

SMOOTHING = 10
"""Logged points that a drawn point of a training curve is the mean of."""
COMPARED_DRAFTS = 3
"""Drafts per verification that all variants make, by which they are compared beside all drafts."""


@dataclass(frozen=True)
class Result:
    """What a variant has reached.

    ``flags``: in which it differs. ``acceptance``: per drafted position, of all verifications.
    ``passes``: of the draft's layers per verification. ``flop``: of the draft's whole training, the
    base's forward left out; None where it is not counted. ``curve``: (iteration, simulated
    accepted length).
    """

    flags: str
    iterations: int
    accepted_length: float
    acceptance: list[float]
    equal_to_greedy: bool
    supervised_rows: int
    passes: int
    flop: float | None
    curve: list[tuple[int, float]]

    @classmethod
    def read(
        cls, folder: Path, group: Group, variant: str, iterations: int, flop: float | None
    ) -> Result:
        """Read the evaluation and the log of a training; ``flop``: of an answer."""
        report = json.loads((folder / "eval.json").read_text())
        lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
        key = "simulated_accepted_length"
        curve = {line["iteration"]: line[key] for line in lines if key in line}
        flags, acceptance = group.flags(variant), report["acceptance"]
        return cls(
            flags=shown(group.variants[variant]),
            iterations=iterations,
            accepted_length=report["accepted_length"],
            acceptance=acceptance,
            equal_to_greedy=report["equal_to_greedy"],
            supervised_rows=supervised_rows(lines),
            passes=1 if "--eagle-block-size" in flags else len(acceptance),
            flop=None if flop is None else flop * iterations,
            curve=sorted(curve.items()),
        )

    @property
    def compared_length(self) -> float:
        """The accepted length if drafts behind the first few are thrown away, as near as one
        evaluation tells: other chains would start at other tokens."""
        return 1 + sum(self.acceptance[:COMPARED_DRAFTS])

    @property
    def passes_per_token(self) -> float:
        """Passes of the draft's layers per token that is written."""
        return self.passes / self.accepted_length


def supervised_rows(lines: list[dict[str, Any]]) -> int:
    """Return the rows that a training supervised, from its logged lines.

    A line counts from the start of its run. A run that was resumed starts from 0, and repeats what
    an earlier one did behind its last checkpoint.
    """
    interval: dict[int, int] = {}
    last_iteration = last_rows = 0
    for line in lines:
        iteration, rows = line["iteration"], line["supervised_rows"]
        goes_on = iteration > last_iteration and rows > last_rows
        interval[iteration] = rows - last_rows if goes_on else rows
        last_iteration, last_rows = iteration, rows
    return sum(interval.values())


def shown(flags: Mapping[str, str | None]) -> str:
    """Return the flags of a variant for a reader."""
    words = (
        f"no `{flag}`" if value is None else f"`{flag} {value}`".replace(" `", "`")
        for flag, value in flags.items()
    )
    return ", ".join(words)


Columns = dict[str, Callable[[Result], str]]
COLUMNS: Columns = {
    "accepted length": lambda of: f"{of.accepted_length:.3f}",
    "acceptance per position": lambda of: " ".join(f"{x:.2f}" for x in of.acceptance),
    "supervised rows": lambda of: f"{of.supervised_rows:,}",
}
BLOCK_COLUMNS: Columns = {
    "accepted length": COLUMNS["accepted length"],
    f"of {COMPARED_DRAFTS} drafts": lambda of: f"{of.compared_length:.3f}",
    "acceptance per position": COLUMNS["acceptance per position"],
    "draft passes per token": lambda of: f"{of.passes_per_token:.2f}",
    "answers": lambda of: f"{of.iterations}",
    "supervised rows": COLUMNS["supervised rows"],
    "TFLOP": lambda of: "" if of.flop is None else f"{of.flop / 1e12:.1f}",
}
FLAGS: Columns = {"other flags": lambda of: of.flags}


def write_results(runs: Path, group: str, results: Mapping[str, Result]) -> None:
    """Write the group's results, table and plot into ``runs``."""
    suffix = "" if group == "eagle" else f"-{group}"
    values = {name: asdict(of) for name, of in results.items()}
    (runs / f"results{suffix}.json").write_text(json.dumps(values, indent=2) + "\n")
    text = table(results, COLUMNS | FLAGS if group == "eagle" else BLOCK_COLUMNS)
    (runs / f"quality{suffix}.md").write_text(text)
    print(text, end="")
    if results:
        from benchmarks.quality_plot import plot_blocks, plot_eagle

        plot = plot_eagle if group == "eagle" else plot_blocks
        plot(results, runs / f"quality{suffix}.png")


def table(results: Mapping[str, Result], columns: Columns) -> str:
    """Return a Markdown table with a line for each result."""
    head = ["variant", *columns]
    lines = [head, ["---"] * len(head)]
    lines += [[name, *(cell(of) for cell in columns.values())] for name, of in results.items()]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines).replace("| --- ", "|---")
