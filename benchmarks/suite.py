"""Run the benchmark's cases, each in a fresh process, and keep their JSON lines.

    python benchmarks/suite.py               # ours
    python benchmarks/suite.py --peers       # the peers, with the environment of `make bench-peers`

Lines go to docs/benchmarks/results-avx2.jsonl or what else PyTorch calls this processor's vector
instructions, which decide who is fast: a new line takes the place of an old one of the same case.
benchmarks/report.py makes the table and the plots from them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.problem import SIZES
from megatron_eagle.platform import recommended_environment

ROOT = Path(__file__).resolve().parents[1]
CAPABILITY = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "-")
RESULTS = ROOT / "docs" / "benchmarks" / f"results-{CAPABILITY}.jsonl"
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
PEERS_OF_SIZE = {
    "S": ("modelopt-before", "modelopt-eager", "modelopt-compiled", "specforge", "speculators"),
    "S-D8000": ("modelopt-eager", "specforge", "speculators"),
    "M": ("modelopt-eager", "specforge", "speculators"),
    "M-D8000": ("modelopt-eager", "specforge", "speculators"),
    "M-D8000-60-masked": ("modelopt-eager", "specforge", "speculators"),
    "attention-2048": ("modelopt-eager", "specforge", "speculators"),
}
SWEEP = ["--vocab", "8000", "--batch", "1"]
SWEEPS = {
    "ttt": (1, 3, 5, 7),
    "seq": (256, 512, 1024, 2048),
    "vocab": (8000, 16000, 32000, 64000),
    "mask-fraction": (0.0, 0.25, 0.5, 0.75),
}
SWEEP_PEERS = ("modelopt-eager", "specforge")


def cases(peers: bool) -> list[tuple[str, str, list[str]]]:
    """(case, implementation, flags) of everything to run."""
    sweeps = [
        (f"{flag}={value}", [*SWEEP, f"--{flag}", str(value)])
        for flag, values in SWEEPS.items()
        for value in values
    ]
    if peers:
        sized = [(s, p, ["--size", s]) for s, names in PEERS_OF_SIZE.items() for p in names]
        return sized + [(name, peer, flags) for name, flags in sweeps for peer in SWEEP_PEERS]
    found = [(size, "ours", ["--size", size]) for size in SIZES]
    found += [
        (size, "ours, recompute mlp", ["--size", size, "--recompute", "mlp"])
        for size in ("S", "M", "attention-2048")
    ]
    found += [
        (size, "ours, given logits", ["--size", size, "--given-logits"])
        for size in ("S", "S-D8000", "M", "M-D8000", "attention-2048")
    ]
    found += [("M", "ours, one chunk", ["--size", "M", "--loss-chunk-mib", "512"])]
    found += [("S", "ours, compiled", ["--size", "S", "--compile"])]
    found += [("S", "ours, TP 2", ["--size", "S", "--tp", "2"])]
    return found + [(name, "ours", flags) for name, flags in sweeps]


def run(case: str, implementation: str, flags: list[str], iters: int) -> dict[str, object] | None:
    """One fresh process; its JSON line, or ``None`` with its last words on stderr."""
    if implementation.startswith("ours"):
        command = [sys.executable, "benchmarks/draft_step.py"]
        environment = dict(os.environ)
    else:
        command = [str(PEER_PYTHON), "benchmarks/peers/step.py", "--peer", implementation]
        environment = {**recommended_environment(), **os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command += [*flags, "--iters", str(iters)]
    load = os.getloadavg()[0]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        print(f"{case}, {implementation}: failed\n{done.stderr[-1500:]}", file=sys.stderr)
        return None
    shown = " ".join(command[1:])
    extra = {"case": case, "implementation": implementation, "command": shown}
    return {**json.loads(lines[-1]), **extra, "load": round(load, 1), "date": time.strftime("%F")}


def keep(line: dict[str, object]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    old = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    name = (line["case"], line["implementation"])
    others = [x for x in map(json.loads, old) if (x["case"], x["implementation"]) != name]
    RESULTS.write_text("".join(json.dumps(x) + "\n" for x in [*others, line]))


def main() -> int:
    parser = argparse.ArgumentParser(description="run the benchmark's cases")
    parser.add_argument("--peers", action="store_true", help="the peers instead of ours")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--implementation", default="", help="those whose name contains this")
    parser.add_argument("--iters", type=int, default=5)
    args = parser.parse_args()
    if args.peers and not PEER_PYTHON.exists():
        print(f"error: {PEER_PYTHON} is missing: run make bench-peers", file=sys.stderr)
        return 2
    failed = 0
    for case, implementation, flags in cases(args.peers):
        if args.only not in case or args.implementation not in implementation:
            continue
        line = run(case, implementation, flags, args.iters)
        failed += line is None
        if line is not None:
            keep(line)
            print(f"{case}, {implementation}: {line['cpu_ms']} CPU ms, {line['peak_mib']} MiB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
