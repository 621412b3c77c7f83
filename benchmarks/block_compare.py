"""Our training step of block drafts beside those of three libraries: prints tables of ratios.

    python benchmarks/block_compare.py               # after `make bench-peers` made .venv-peers
    python benchmarks/block_compare.py --size S --rounds 5 --case "DFlash ce"
    python benchmarks/block_compare.py --answer 8    # half of the blocks' slots judged

speculators trains on the divergence from the base, SpecForge and Automodel on the data's tokens, so
each is compared with ours under its own loss. Every step runs in a fresh process. The
implementations take turns, so that what else a machine does meets all of them; shown are medians of
the rounds. It fails if a loss differs from ours, or a peer does not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
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
LABELED = ("specforge", "automodel")
CASES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "DFlash kl": (["--loss", "kl"], ("speculators",)),
    "DFlash ce": (["--loss", "ce"], LABELED),
    "DSpark kl": (["--dspark", "--loss", "kl"], ("speculators",)),
    "DSpark ce-l1": (["--dspark", "--loss", "ce-l1"], LABELED),
}
"""Name -> flags of block_step.py, and the peers that have this loss."""
TOLERANCE = 1e-5
"""Of a loss, relative: fp32 sums in another order."""
Line = dict[str, Any]


def run(implementation: str, python: Path, flags: list[str]) -> Line:
    """Return the line that one fresh process prints; raise ``RuntimeError`` with its last words."""
    command = [str(python), "benchmarks/block_step.py", "--implementation", implementation, *flags]
    environment = {**recommended_environment(), **os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-1500:]}")
    found: Line = json.loads(lines[-1])
    return found


def medians(rounds: list[dict[str, Line]]) -> dict[str, Line]:
    """Return of each implementation the medians over its lines in all rounds."""
    return {
        name: {
            field: median(lines[name][field] for lines in rounds)
            for field, value in rounds[0][name].items()
            if isinstance(value, int | float)
        }
        for name in rounds[0]
    }


def rows(case: str, found: dict[str, Line]) -> list[str]:
    """Return a table's rows, ours first; the ratios are a peer's time or memory over ours."""
    ours, shown = found["ours"], []
    for name, line in found.items():
        cells = [case, name]
        for field in ("cpu_ms", "wall_ms", "peak_mib"):
            ratio = "" if name == "ours" else f" ({line[field] / ours[field]:.2f})"
            cells.append(f"{line[field]:.0f}{ratio}")
        cells.append(f"{line['loss']:.6f}")
        shown.append(f"| {' | '.join(cells)} |")
    return shown


def verdict(case: str, found: dict[str, Line]) -> tuple[str, bool]:
    """Return a sentence on the peer with the least CPU time, and whether all losses agree."""
    ours = found["ours"]
    peers = {name: line for name, line in found.items() if name != "ours"}
    best = min(peers, key=lambda name: float(peers[name]["cpu_ms"]))
    times, memory = (peers[best][field] / ours[field] for field in ("cpu_ms", "peak_mib"))
    worst = max(abs(line["loss"] / ours["loss"] - 1) for line in peers.values())
    same = worst <= TOLERANCE
    sentence = (
        f"{case}: the best peer, {best}, takes {times:.2f} times our CPU time and {memory:.2f} "
        f"times our memory; losses {'agree' if same else 'DIFFER'} ({worst:.1e})"
    )
    return sentence, same


def main() -> int:
    parser = argparse.ArgumentParser(description="compare steps of block drafts")
    parser.add_argument("--size", choices=SIZES, action="append", help="default: S and M")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every implementation")
    parser.add_argument("--iters", type=int, default=5, help="steps of a process")
    parser.add_argument("--mask-fraction", type=float, default=0.5, help="how much is prompt")
    parser.add_argument("--answer", type=int, default=0, help="tokens of an answer; 0: only one")
    parser.add_argument(
        "--peer-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python",
        help="an interpreter that has the peers",
    )  # fmt: skip
    args = parser.parse_args()
    if not args.peer_python.exists():
        print(f"error: {args.peer_python} is missing: run make bench-peers", file=sys.stderr)
        return 2
    pythons = {"ours": Path(sys.executable)}
    agree = True
    for size in args.size or ("S", "M"):
        answers = f"answers of {args.answer} tokens" if args.answer else "one answer"
        print(f"\nSize {size}, {args.mask_fraction:.0%} masked, {answers}, {args.rounds} rounds\n")
        print("| draft, loss | implementation | CPU ms | wall ms | peak MiB | loss |")
        print("|---" * 6 + "|", flush=True)
        verdicts = []
        for case in args.case or CASES:
            own, peers = CASES[case]
            flags = [*SIZES[size], *own, "--iters", str(args.iters)]
            flags += ["--mask-fraction", str(args.mask_fraction), "--answer", str(args.answer)]
            turns = [
                {name: run(name, pythons.get(name, args.peer_python), flags)
                 for name in ("ours", *peers)}
                for _ in range(args.rounds)
            ]  # fmt: skip
            found = medians(turns)
            print("\n".join(rows(case, found)), flush=True)
            verdicts.append(verdict(case, found))
        print("\n" + "\n".join(sentence for sentence, _ in verdicts), flush=True)
        agree &= all(same for _, same in verdicts)
    if not agree:
        print("error: the losses differ", file=sys.stderr)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
