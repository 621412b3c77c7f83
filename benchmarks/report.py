"""Make the tables and plots of docs/benchmarks from what suite.py measured on such a processor."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.problem import SIZES
from benchmarks.suite import CAPABILITY, RESULTS, SWEEPS

TABLES = RESULTS.parent / f"tables-{CAPABILITY}.md"
STEP_DECAY = 0.8
Line = dict[str, Any]


def _own_rows(ours: Line) -> float:
    """Our steps' losses as some peers add them up: each divided by its own rows, not step 0's."""
    return sum(STEP_DECAY**step * loss for step, loss in enumerate(ours["loss_per_step"]))


SAME_LOSS: dict[str, Callable[[Line], float]] = {
    "specforge": lambda ours: ours["loss"],
    "modelopt": _own_rows,
    "speculators": _own_rows,  # of one sequence: it judges the last rows of one by the next
}
TOLERANCE = 1e-4


def main() -> int:
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    sweeps = [f"{flag}={value}" for flag, values in SWEEPS.items() for value in values]
    sized = [line for line in lines if line["case"] not in sweeps]
    TABLES.write_text(_heading() + _table(sized) + _sweep_table(lines))
    _plot(lines)
    return _check_losses(sized)


def _heading() -> str:
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines()
         if x.startswith("model name")), platform.processor(),
    )  # fmt: skip
    return (
        f"<!-- made by benchmarks/report.py from {RESULTS.name}: do not edit -->\n"
        f"{cpu} ({CAPABILITY.upper()}), torch {version('torch')}, megatron-core "
        f"{version('megatron-core')}; fp32, medians of a fresh process; "
        "load: jobs that ran or waited when it started.\n\n"
    )


def _table(lines: list[Line]) -> str:
    rows = "| case | implementation | threads | CPU ms | wall ms | peak MiB | saved MiB | load |\n"
    rows += "|---|---|---|---|---|---|---|---|\n"
    order = {case: i for i, case in enumerate(dict.fromkeys(x["case"] for x in lines))}
    for x in sorted(lines, key=lambda x: (order[x["case"]], x["implementation"])):
        rows += (
            f"| {x['case']} | {x['implementation']} | {x['threads']} | {x['cpu_ms']:.0f} "
            f"| {x['wall_ms']:.0f} | {x['peak_mib']:.0f} | {x['saved_mib']:.0f} | {x['load']} |\n"
        )
    return rows


def _sweep_table(lines: list[Line]) -> str:
    found = {(x["case"], x["implementation"]): x for x in lines}
    names = sorted({name for case, name in found if "=" in case}, reverse=True)
    if not names:
        return ""
    rows = "\nhidden 256, vocabulary 8000, one sequence of 512 tokens, K 3, one of them varied: "
    rows += "CPU ms / peak MiB\n\n| | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1)
    rows += "|\n"
    for flag, values in SWEEPS.items():
        for value in values:
            cells = [found.get((f"{flag}={value}", name)) for name in names]
            shown = [f"{x['cpu_ms']:.0f} / {x['peak_mib']:.0f}" if x else "" for x in cells]
            if any(cells):
                rows += f"| {flag} {value} | " + " | ".join(shown) + " |\n"
    return rows


def _plot(lines: list[Line]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not any("=" in line["case"] for line in lines):
        return
    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(14, 6), squeeze=False)
    for column, (flag, values) in enumerate(SWEEPS.items()):
        for row, measure in enumerate(("cpu_ms", "peak_mib")):
            axis = axes[row][column]
            for name in ("ours", "modelopt-eager", "specforge"):
                points = {
                    value: x[measure]
                    for value in values
                    for x in lines
                    if x["case"] == f"{flag}={value}" and x["implementation"] == name
                }
                if points:
                    axis.plot(list(points), list(points.values()), marker="o", label=name)
            axis.set_ylim(bottom=0)
            axis.set_xlabel(flag)
            axis.set_ylabel({"cpu_ms": "CPU ms", "peak_mib": "peak MiB"}[measure])
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(RESULTS.parent / f"sweeps-{CAPABILITY}.png", dpi=70)


def _check_losses(lines: list[Line]) -> int:
    """1 if an implementation of the same loss gave another number."""
    ours = {x["case"]: x for x in lines if x["implementation"] == "ours"}
    wrong = 0
    for x in lines:
        peer = x["implementation"].split("-")[0]
        problem = SIZES[x["case"]]
        packed = peer == "speculators" and problem.batch > 1
        # SpecForge leaves out rows whose best token the draft cannot say, and peers differ in the
        # rows that a mask leaves them at later steps.
        fewer = peer == "specforge" and problem.draft_vocab < problem.vocab
        comparable = not (packed or fewer or problem.mask_fraction)
        if peer in SAME_LOSS and x["case"] in ours and comparable:
            theirs = x["loss"] + x.get("loss_offset", 0.0)
            difference = abs(theirs / SAME_LOSS[peer](ours[x["case"]]) - 1)
            print(f"{x['case']}: {x['implementation']}'s loss differs by {difference:.1e}")
            wrong += difference > TOLERANCE
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
