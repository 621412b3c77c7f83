"""Our training step of block drafts beside those of three libraries: prints tables of ratios.

    python benchmarks/block_compare.py               # after `make bench-peers` made .venv-peers
    python benchmarks/block_compare.py --size S --rounds 5 --case "DFlash ce"
    python benchmarks/block_compare.py --answer 8    # half of the blocks' slots judged

speculators trains on the divergence from the base, SpecForge and Automodel on the data's tokens, so
each is compared with ours under its own loss. Every implementation has a process of its own, and
they take turns step by step, so that what else a machine does meets all of them; shown are medians,
and in brackets medians of the turns' ratios. It fails if a loss differs from ours, or a peer does
not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Self

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
TIMES = ("cpu_ms", "wall_ms")
Line = dict[str, Any]


class Worker:
    """A process that runs one implementation's step whenever it is asked; a context manager."""

    def __init__(self, implementation: str, python: Path, flags: list[str]) -> None:
        command = [str(python), "benchmarks/block_step.py", "--implementation", implementation]
        self.command = [*command, *flags, "--turns"]

    def __enter__(self) -> Self:
        environment = {**recommended_environment(), **os.environ, "CUDA_VISIBLE_DEVICES": ""}
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env=environment, text=True, bufsize=1, stderr=self.errors,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.process.communicate()
        self.process.kill()
        self.errors.close()

    def line(self) -> Line:
        """Return the next line that it prints; raise ``RuntimeError`` with its last words."""
        assert self.process.stdout is not None
        for text in self.process.stdout:
            if text.startswith("{"):
                found: Line = json.loads(text)
                return found
        self.errors.seek(0)
        raise RuntimeError(f"{' '.join(self.command)}\n{self.errors.read()[-1500:]}")

    def turn(self) -> Line:
        """Let it run a step; return the times."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        return self.line()


def compare(pythons: Mapping[str, Path], flags: list[str], rounds: int) -> dict[str, Line]:
    """Return the line of each implementation: memory, loss, times, and ratios to the times of
    "ours"."""
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(name, python, flags))
            for name, python in pythons.items()
        }
        found = {name: worker.line() for name, worker in workers.items()}
        turns = [{name: worker.turn() for name, worker in workers.items()} for _ in range(rounds)]
    return {name: {**line, **times_of(name, turns)} for name, line in found.items()}


def times_of(name: str, turns: list[dict[str, Line]]) -> Line:
    """Return an implementation's median times, and the medians of the turns' ratios to ours."""
    line: Line = {}
    for field in TIMES:
        line[field] = median(turn[name][field] for turn in turns)
        line[f"{field}_ratio"] = median(turn[name][field] / turn["ours"][field] for turn in turns)
    return line


def rows(case: str, found: dict[str, Line]) -> list[str]:
    """Return a table's rows, ours first; the ratios are a peer's time or memory over ours."""
    ours, shown = found["ours"], []
    for name, line in found.items():
        cells = [case, name]
        line = {**line, "peak_mib_ratio": line["peak_mib"] / ours["peak_mib"]}
        for field in (*TIMES, "peak_mib"):
            ratio = "" if name == "ours" else f" ({line[f'{field}_ratio']:.2f})"
            cells.append(f"{line[field]:.0f}{ratio}")
        cells.append(f"{line['loss']:.6f}")
        shown.append(f"| {' | '.join(cells)} |")
    return shown


def verdict(case: str, found: dict[str, Line]) -> tuple[str, bool]:
    """Return a sentence on the peer with the least CPU time, and whether all losses agree."""
    ours = found["ours"]
    peers = {name: line for name, line in found.items() if name != "ours"}
    best = min(peers, key=lambda name: float(peers[name]["cpu_ms_ratio"]))
    times, memory = peers[best]["cpu_ms_ratio"], peers[best]["peak_mib"] / ours["peak_mib"]
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
    parser.add_argument("--rounds", type=int, default=15, help="steps of every implementation")
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
    agree = True
    for size in args.size or ("S", "M"):
        answers = f"answers of {args.answer} tokens" if args.answer else "one answer"
        print(f"\nSize {size}, {args.mask_fraction:.0%} masked, {answers}, {args.rounds} rounds\n")
        print("| draft, loss | implementation | CPU ms | wall ms | peak MiB | loss |")
        print("|---" * 6 + "|", flush=True)
        verdicts = []
        for case in args.case or CASES:
            own, peers = CASES[case]
            flags = [*SIZES[size], *own, "--mask-fraction", str(args.mask_fraction)]
            flags += ["--answer", str(args.answer)]
            pythons = {"ours": Path(sys.executable)} | dict.fromkeys(peers, args.peer_python)
            found = compare(pythons, flags, args.rounds)
            print("\n".join(rows(case, found)), flush=True)
            verdicts.append(verdict(case, found))
        print("\n" + "\n".join(sentence for sentence, _ in verdicts), flush=True)
        agree &= all(same for _, same in verdicts)
    if not agree:
        print("error: the losses differ", file=sys.stderr)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
