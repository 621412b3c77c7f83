"""The plots of the quality study."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.quality_report import COMPARED_DRAFTS, SMOOTHING, Result

matplotlib.use("Agg")
from matplotlib import pyplot

COLORS = {"eagle3": "tab:blue", "mtp": "tab:gray", "dflash": "tab:orange", "dspark": "tab:green"}
Results = Mapping[str, Result]


def plot_eagle(results: Results, file: Path) -> None:
    """Draw left, accepted length on held-out prompts; right, the simulated one, in training."""
    figure, (bars, curves) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    _bars(bars, results, lambda _: "tab:blue")
    curves.set_prop_cycle(color=pyplot.get_cmap("tab20")(range(20)))
    for name, of in results.items():
        iterations, values = zip(*of.curve, strict=True)
        means = [
            sum(values[max(0, i - SMOOTHING + 1) : i + 1]) / min(i + 1, SMOOTHING)
            for i in range(len(values))
        ]
        curves.plot(iterations, means, label=name, linewidth=1)
    curves.set(xlabel="iteration", ylabel="simulated accepted length (all K steps)")
    curves.legend(fontsize=7)
    _save(figure, file)


def plot_blocks(results: Results, file: Path) -> None:
    """Draw left, accepted length; middle, acceptance per position; right, against FLOP."""
    figure, (bars, positions, work) = pyplot.subplots(1, 3, figsize=(15, 5))
    _bars(bars, results, _color)
    for name, of in results.items():
        color, matched = _color(name), name.endswith("equal FLOP")
        if of.flop is not None:
            work.scatter(of.flop / 1e12, of.compared_length, color=color, marker="sx"[matched])
            label = name.removesuffix(", equal FLOP")
            work.annotate(label, (of.flop / 1e12, of.compared_length), fontsize=6)
        if not matched:
            drafted = range(1, len(of.acceptance) + 1)
            positions.plot(drafted, of.acceptance, color=color, marker=".", linewidth=0.8)
    for algorithm, color in COLORS.items():
        positions.plot([], [], color=color, label=algorithm)
    positions.legend()
    positions.xaxis.get_major_locator().set_params(integer=True)
    positions.set(
        xlabel="drafted position", ylabel="accepted, of all verifications", ylim=(0, None)
    )
    work.set(
        xlabel="TFLOP of the draft's training (x: equal FLOP)",
        ylabel=f"accepted length of {COMPARED_DRAFTS} drafts",
    )
    work.margins(x=0.2)
    _save(figure, file)


def _color(name: str) -> str:
    """Return the color of a variant's algorithm, with which its name begins."""
    return COLORS[name.split()[0].rstrip(",")]


def _bars(axes: Any, results: Results, color: Callable[[str], str]) -> None:
    names = sorted(results, key=lambda name: results[name].accepted_length)
    lengths = [results[name].accepted_length for name in names]
    axes.barh(names, lengths, color=[color(name) for name in names])
    axes.bar_label(axes.containers[0], fmt="%.3f", padding=2, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set(xlabel="accepted length, held-out prompts", xlim=(1.0, max(lengths) + 0.1))


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=90)
