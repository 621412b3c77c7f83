"""The quality study's results: results.json, a Markdown table, and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SMOOTHING = 10
"""Logged points that a drawn point of a training curve is the mean of."""


def write_results(
    runs: Path, folders: dict[str, Path], variants: dict[str, dict[str, str | None]]
) -> None:
    """results.json, quality.md and quality.png in ``runs``, of the variants that are finished."""
    found = {
        name: {"flags": _flags(variants[name]), **_result(folder)}
        for name, folder in folders.items()
        if (folder / "eval.json").exists()
    }
    (runs / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    table = _table(found)
    (runs / "quality.md").write_text(table)
    print(table, end="")
    _plot(found, runs / "quality.png")


def _flags(variant: dict[str, str | None]) -> str:
    shown = (
        f"no `{flag}`" if value is None else f"`{flag} {value}`".replace(" `", "`")
        for flag, value in variant.items()
    )
    return ", ".join(shown)


def _result(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "eval.json").read_text())
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    curve = [
        [line["iteration"], line[key]]
        for line in lines
        for key in ("simulated_accepted_length", "accepted_length")  # the second: older runs
        if key in line
    ]
    return {
        "accepted_length": report["accepted_length"],
        "acceptance": report["acceptance"],
        "equal_to_greedy": report["equal_to_greedy"],
        "supervised_rows": max(line["supervised_rows"] for line in lines),
        "curve": curve,
    }


def _table(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        f"| {name} | {of['accepted_length']:.3f} | "
        f"{' '.join(f'{x:.2f}' for x in of['acceptance'])} | {of['supervised_rows']:,} | "
        f"{of['flags']} |"
        for name, of in found.items()
    ]
    head = [
        "| variant | accepted length | acceptance per position | supervised rows | other flags |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


def _plot(found: dict[str, dict[str, Any]], file: Path) -> None:
    """Left, accepted length on held-out prompts; right, the simulated one, in training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (bars, curves) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    names = sorted(found, key=lambda name: found[name]["accepted_length"])
    lengths = [found[name]["accepted_length"] for name in names]
    bars.barh(names, lengths)
    bars.bar_label(bars.containers[0], fmt="%.3f", padding=2, fontsize=8)
    bars.set(xlabel="accepted length, held-out prompts", xlim=(1.0, max(lengths) + 0.1))
    curves.set_prop_cycle(color=pyplot.get_cmap("tab20")(range(20)))
    for name, of in found.items():
        iterations, values = zip(*of["curve"], strict=True)
        means = [
            sum(values[max(0, i - SMOOTHING + 1) : i + 1]) / min(i + 1, SMOOTHING)
            for i in range(len(values))
        ]
        curves.plot(iterations, means, label=name, linewidth=1)
    curves.set(xlabel="iteration", ylabel="simulated accepted length (all K steps)")
    curves.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
