"""One peer's forward and backward on the same weights and inputs: prints one JSON line.

.venv-peers/bin/python benchmarks/peers/step.py --peer modelopt-eager --size S
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.measure import measure
from benchmarks.problem import add_problem_flags, problem_from

PEERS = {
    "modelopt-before": ("modelopt_hf", "before"),
    "modelopt-eager": ("modelopt_hf", "eager"),
    "modelopt-compiled": ("modelopt_hf", "compiled"),
    "specforge": ("specforge_llama", ""),
    "speculators": ("speculators_llama", ""),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="one peer's training step")
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--iters", type=int, default=5)
    add_problem_flags(parser)
    args = parser.parse_args()
    module, variant = PEERS[args.peer]
    peer = importlib.import_module(f"benchmarks.peers.{module}")
    problem = problem_from(args)
    forward, resting = peer.build(problem, variant)
    line = {"implementation": args.peer, **measure(forward, resting, args.iters)}
    if hasattr(peer, "loss_offset"):
        line["loss_offset"] = peer.loss_offset(problem)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
