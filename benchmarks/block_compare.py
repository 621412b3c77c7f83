"""Our training step of block drafts beside the speculators library's: prints a table of ratios.

    python benchmarks/block_compare.py               # after `make bench-peers` made .venv-peers
    python benchmarks/block_compare.py --size S --iters 9

Every step runs in a fresh process, ours and the peer's in turn, so that what else a machine does
meets both. It fails if the losses differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_eagle.platform import recommended_environment

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "tiny": ["--hidden", "32", "--intermediate", "64", "--heads", "4", "--kv-heads", "2", "--vocab",
             "90", "--seq", "64", "--block", "4", "--anchors", "8", "--rank", "6"],
    "S": [],
    "M": ["--hidden", "1024", "--intermediate", "4096", "--heads", "16", "--kv-heads", "8",
          "--vocab", "32000", "--layers", "5", "--aux", "5", "--rank", "256"],
}  # fmt: skip
KINDS = {"DFlash": [], "DSpark": ["--dspark"]}
TOLERANCE = 1e-5
"""Of a loss, relative: fp32 sums in another order."""


def run(implementation: str, python: Path, flags: list[str]) -> dict[str, Any]:
    """Return the line that one fresh process prints; raise ``RuntimeError`` with its last words."""
    command = [str(python), "benchmarks/block_step.py", "--implementation", implementation, *flags]
    environment = {**recommended_environment(), **os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-1500:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def row(size: str, kind: str, peer_python: Path, iters: int) -> tuple[str, bool]:
    """Return a table's row, and whether the losses agree."""
    flags = [*SIZES[size], *KINDS[kind], "--iters", str(iters)]
    ours = run("ours", Path(sys.executable), flags)
    peer = run("speculators", peer_python, flags)
    cells = [size, kind]
    for name in ("cpu_ms", "peak_mib"):
        ratio = peer[name] / ours[name]
        cells += [f"{ours[name]:.0f}", f"{peer[name]:.0f}", f"{ratio:.2f}"]
    cells += [f"{ours['loss']:.6f}", f"{peer['loss']:.6f}"]
    return f"| {' | '.join(cells)} |", abs(ours["loss"] - peer["loss"]) <= TOLERANCE * ours["loss"]


def main() -> int:
    parser = argparse.ArgumentParser(description="compare steps of block drafts")
    parser.add_argument("--size", choices=SIZES, action="append", help="default: S and M")
    parser.add_argument(
        "--peer-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python",
        help="an interpreter that has the speculators library",
    )  # fmt: skip
    parser.add_argument("--iters", type=int, default=5)
    args = parser.parse_args()
    if not args.peer_python.exists():
        print(f"error: {args.peer_python} is missing: run make bench-peers", file=sys.stderr)
        return 2
    print("| size | draft | CPU ms, ours | speculators | ratio | peak MiB, ours | speculators "
          "| ratio | loss, ours | speculators |")  # fmt: skip
    print("|---" * 10 + "|")
    agree = True
    for size in args.size or ("S", "M"):
        for kind in KINDS:
            line, same = row(size, kind, args.peer_python, args.iters)
            print(line, flush=True)
            agree &= same
    if not agree:
        print("error: the losses differ", file=sys.stderr)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
