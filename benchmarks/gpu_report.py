"""The report of ``benchmarks/gpu.py``: one Markdown file, and the same as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.floors import GOAL, floor_ms, step_tera_flops
from benchmarks.problem import Problem

TARGET = "plain ModelOpt compiled"
FASTER = 1.5


@dataclasses.dataclass
class Report:
    """Findings of one run on one ``device``, in order; each is printed as it comes."""

    device: str
    versions: dict[str, str]
    findings: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    profiles: dict[str, str] = dataclasses.field(default_factory=dict)
    parts: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    minutes: float = 0.0

    def say(self, part: str, **found: Any) -> None:
        """Add a finding, and print it as a line of JSON."""
        self.findings.append({"part": part, **found})
        print(json.dumps(self.findings[-1]), flush=True)

    def write(self, path: Path, cases: dict[str, Problem]) -> None:
        """Write ``path`` (Markdown) and its neighbour of the suffix .json."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        path.write_text(self.markdown(cases))

    def markdown(self, cases: dict[str, Problem]) -> str:
        """Return the report: checks, a table per case with its floor, profiles."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        took = f"{versions}; all of it took {self.minutes:.1f} minutes"
        lines = [f"# One {self.device}", "", took, "", "## Checks", ""]
        checks = [found for found in self.findings if "case" not in found]
        lines += [f"* {found['part']}: {_words(found)}" for found in checks]
        for name, problem in cases.items():
            lines += ["", f"## {name}", "", *self._case(name, problem)]
        for name, table in self.profiles.items():
            lines += ["", f"## Profile: {name}", "", "| part of ours | ms |", "|---|---|"]
            lines += [f"| {part} | {ms:.2f} |" for part, ms in self.parts.get(name, {}).items()]
            lines += ["", "```", table, "```"]
        return "\n".join(lines) + "\n"

    def _case(self, name: str, problem: Problem) -> list[str]:
        flops, floor = step_tera_flops(problem), floor_ms(problem, self.device)
        known = "no floor for this device" if floor is None else f"floor {floor:.0f} ms"
        lines = [
            f"V {problem.vocab}, D {problem.draft_vocab}, H {problem.hidden}, K {problem.ttt}, "
            f"S {problem.seq}, B {problem.batch}, masked {problem.mask_fraction:.0%}, "
            f"documents in a sequence {problem.documents}, "
            f"{problem.dtype}: {flops:.0f} TFLOP, {known} (goal: at most {GOAL} times)",
            "",
            "| implementation | batch | ms | times the floor | ms a sequence | peak MiB |",
            "|---|---|---|---|---|---|",
        ]
        rows = [found for found in self.findings if found.get("case") == name]
        for found in rows:
            if "failed" in found:
                lines.append(f"| {found['part']} | {found['batch']} | {found['failed']} | | | |")
                continue
            share = problem.batch / found["batch"]
            times = "" if floor is None else f"{found['wall_ms'] * share / floor:.2f}"
            lines.append(
                f"| {found['part']} | {found['batch']} | {found['wall_ms']} | {times} "
                f"| {found['wall_ms_per_sequence']} | {found['peak_mib']:.0f} |"
            )
        return lines + _verdict(rows)


def _verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Compare the fastest of ours with ModelOpt's mathematics, compiled."""
    times = {f["part"]: f["wall_ms_per_sequence"] for f in rows if "failed" not in f}
    ours = [time for part, time in times.items() if part.startswith("ours")]
    if not ours or TARGET not in times:
        return []
    ratio = times[TARGET] / min(ours)
    return ["", f"{TARGET} takes {ratio:.2f} times as long as ours (goal: {FASTER})."]


def _words(found: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items() if key != "part")
