"""Everything to know about one GPU in one command; needs torch and the megatron-core wheel only.

    python benchmarks/gpu.py --report gpu.md      # Llama-3.2-1B's dimensions, bf16
    python benchmarks/gpu.py --device cpu --tiny  # does it run at all

Correctness in bf16 and fp32 against the fp32 reference, of the flash kernels and of the whole step;
host synchronisations (none may happen inside a step); for several vocabularies, masked and packed
data, time and peak memory of every variant beside ModelOpt's mathematics before, after and
compiled, and beside the floor that arithmetic gives; a profile, split by part. ``--report`` writes
all of it as Markdown and JSON. What has not begun when ``--minutes`` are over is left out, and
named. It has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.draft_step import start_megatron
from benchmarks.gpu_attention import check_attention
from benchmarks.gpu_cases import LLAMA_1B, SMALL, TINY, cases_of, device_name, implementations
from benchmarks.gpu_checks import check_correctness, check_no_synchronisation
from benchmarks.gpu_parts import profile_step
from benchmarks.gpu_report import Report
from benchmarks.measure import measure
from benchmarks.problem import Problem

PACKAGES = ("torch", "megatron-core", "triton", "transformer-engine", "apex")
"""Packages that the figures depend on."""
FOR_CASES = 0.85
"""The part of the time after which no further implementation begins: the rest is for profiles."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """The ``minutes`` that a run may take, counted from when this is made."""

    minutes: float
    start: float = dataclasses.field(default_factory=time.monotonic)

    def used(self) -> float:
        """Return the minutes since the start."""
        return (time.monotonic() - self.start) / 60

    def is_over(self, part: float = 1.0) -> bool:
        """Return whether this part of the minutes is used up."""
        return self.used() >= part * self.minutes

    def __str__(self) -> str:
        """Say it as a reason."""
        return f"left out: {self.minutes:g} minutes are over"


def compare(
    report: Report,
    case: str,
    problem: Problem,
    budget: Budget,
    *,
    device: str,
    iters: int,
    skip_compiled: bool,
) -> bool:
    """Measure time and peak memory of each; one that does not fit gets half the batch, until it
    does, and its time counts per sequence. Returns whether all of them ran."""
    all_ran = True
    for name in implementations(problem, device):
        if skip_compiled and "compiled" in name:
            continue
        if budget.is_over(FOR_CASES):
            report.say(name, case=case, batch=problem.batch, failed=str(budget))
            all_ran = False
            continue
        size = problem
        while True:
            error: Exception | None = None
            try:
                found = measure(*implementations(size, device)[name](), iters)
            except Exception as raised:  # a compiler that is not there, say: the others still count
                error = raised.with_traceback(None)  # whose frames hold all tensors
            _free(device)
            if size.batch == 1 or not isinstance(error, torch.OutOfMemoryError):
                break
            size = dataclasses.replace(size, batch=size.batch // 2)
        if error is not None:
            failed = f"{type(error).__name__}: {error}"[:300]
            report.say(name, case=case, batch=size.batch, failed=failed)
            all_ran = False
            continue
        per_sequence = found["wall_ms"] / size.batch
        sequence = round(per_sequence, 3)
        report.say(name, case=case, batch=size.batch, wall_ms_per_sequence=sequence, **found)
    return all_ran


def _free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def profile(report: Report, case: str, problem: Problem, device: str) -> None:
    """Profile ours, and split it by part."""
    forward, _ = implementations(problem, device)["ours"]()
    report.profiles[case], report.parts[case] = profile_step(forward, device)
    print(report.profiles[case], report.parts[case], flush=True)


def main() -> int:
    args = _parser().parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print(f"error: --device {args.device}: there is no CUDA device here", file=sys.stderr)
        return 2
    given = {"batch": args.batch, "draft_vocab": args.draft_vocab}
    changes = {name: value for name, value in given.items() if value is not None}
    problem = dataclasses.replace(TINY if args.tiny else LLAMA_1B, **changes)
    budget = Budget(args.minutes)
    with tempfile.TemporaryDirectory() as scratch:
        start_megatron(0, 1, f"{scratch}/store")
        cases = {"one case": problem} if args.draft_vocab else cases_of(problem)
        report = Report(device_name(args.device), versions())
        ok = run_day(report, cases, args, budget)
        torch.distributed.destroy_process_group()
    report.minutes = budget.used()
    if args.report is not None:
        report.write(args.report, cases)
    return 0 if ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="one GPU: correctness, time, memory, profile")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a problem that a CPU can do")
    parser.add_argument("--batch", type=int, help="sequences (16)")
    parser.add_argument("--draft-vocab", type=int, help="one case alone, of this vocabulary")
    parser.add_argument(
        "--report", type=Path, metavar="FILE.md", help="write the findings, with JSON"
    )
    parser.add_argument("--skip-compiled", action="store_true", help="nothing by torch.compile")
    parser.add_argument("--iters", type=int, default=10)
    parser.add_argument(
        "--minutes", type=float, default=18.0, help="begin nothing after them (%(default)s)"
    )
    return parser


def run_day(
    report: Report, cases: dict[str, Problem], args: argparse.Namespace, budget: Budget
) -> bool:
    """Run the checks and all ``cases``; returns whether everything ran and was right."""
    device = args.device
    right = [check_attention(report, device)]
    right.append(check_correctness(report, TINY if args.tiny else SMALL, device))
    for case, problem in cases.items():
        if device != "cpu" and not budget.is_over(FOR_CASES):
            check_no_synchronisation(report, implementations(problem, device)["ours"]()[0])
        options = {"device": device, "iters": args.iters, "skip_compiled": args.skip_compiled}
        right.append(compare(report, case, problem, budget, **options))
        _free(device)
    for case, problem in cases.items():
        if budget.is_over():
            report.say("profile", case=case, batch=problem.batch, failed=str(budget))
            right.append(False)
            continue
        profile(report, case, problem, device)
        _free(device)
    return all(right)


def versions() -> dict[str, str]:
    """Return the versions of those ``PACKAGES`` that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
