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
    "speculators-ce": ("speculators_llama", "ce"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="one peer's training step")
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--iters", type=int, default=5)
    add_problem_flags(parser)
    args = parser.parse_args()
    module, variant = PEERS[args.peer]
    build = importlib.import_module(f"benchmarks.peers.{module}").build
    forward, resting = build(problem_from(args), variant)
    print(json.dumps({"implementation": args.peer, **measure(forward, resting, args.iters)}))


if __name__ == "__main__":
    main()
