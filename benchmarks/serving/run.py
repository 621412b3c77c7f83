"""Serve the quickstart's draft in a real engine and compare: `make serve`.

    python benchmarks/serving/run.py --python ENVIRONMENT/bin/python [--base DIR --draft DIR]
        [--engine vllm|sglang] [--device cpu|cuda]

One server without the draft and one with it, on loopback; the held-out prompts, greedy, one at a
time and eight; medians of three. Beside the server's counters stand those of `megatron-eagle eval`
(``--eval``, its ``--output``), by the rule that servers count by. Exit status 1 if an answer or a
count differs.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.serving.engine import Draft, Engine, Setting
from benchmarks.serving.measure import Load, ask, load
from benchmarks.serving.server import Server
from benchmarks.serving.sglang_engine import Sglang
from benchmarks.serving.tables import table
from benchmarks.serving.vllm_engine import Vllm

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "quickstart"
FROM_RUNS = {
    "base": "base_hf",
    "draft": "draft_hf",
    "eval": "eval_trained.json",
    "output": "served.json",
}
ENGINES: dict[str, type[Engine]] = {"vllm": Vllm, "sglang": Sglang}


def main() -> int:
    """Run both servers and print the table."""
    args = _arguments()
    if problem := _problem(args):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    # As an exception, which ends the server too; the signal's own way leaves it running.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt_ids"] for line in lines][: args.limit]
    ours = json.loads(args.eval.read_text(encoding="utf-8"))
    draft = Draft(args.draft, args.method, ours["draft_tokens"], args.parallel_drafting)
    plain = _serve(args, None, prompts, ours["max_new_tokens"])
    drafted = _serve(args, draft, prompts, ours["max_new_tokens"])
    text, wrong = table(plain, drafted, ours, whole=len(prompts) == ours["prompts"])
    print(text)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    ways = {"without": plain, "with": drafted}
    figures = {
        name: {str(n): result.as_dict() for n, result in way.items()} for name, way in ways.items()
    }
    args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", type=Path, required=True, help="of the engine's environment")
    parser.add_argument("--runs", type=Path, default=RUNS, help="directory of `make train`")
    for flag, name in FROM_RUNS.items():
        parser.add_argument(f"--{flag}", type=Path, help=f"default: {name} in --runs")
    parser.add_argument("--engine", choices=ENGINES, default="vllm")
    parser.add_argument("--method", default="eagle3", help="eagle for an EAGLE-1 draft")
    parser.add_argument("--parallel-drafting", action="store_true", help="for a P-EAGLE draft")
    data = ROOT / "examples" / "quickstart" / "data" / "eval.jsonl"
    parser.add_argument("--prompts", type=Path, default=data, help="JSONL of prompt_ids")
    parser.add_argument("--limit", type=int, default=40, help="use only the first prompts")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32", help="answers are comparable in float32 only")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--at-a-time", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    for flag, name in FROM_RUNS.items():
        setattr(args, flag, getattr(args, flag) or args.runs / name)
    return args


def _problem(args: argparse.Namespace) -> str | None:
    """Return why nothing can be served, before an engine is started; None if all is well."""
    engine = ENGINES[args.engine]
    if reason := engine.refusal(
        device=args.device, method=args.method, parallel=args.parallel_drafting
    ):
        return reason
    for flag in ("base", "draft", "eval", "prompts", "python"):
        path: Path = getattr(args, flag)
        if not path.exists():
            hint = " (`make train` makes it)" if path.is_relative_to(args.runs) else ""
            return f"--{flag} {path}: no such file or directory{hint}"
    if "server_accepted" not in json.loads(args.eval.read_text(encoding="utf-8")):
        return f"--eval {args.eval}: an earlier release wrote it; run eval again"
    return None


def _serve(
    args: argparse.Namespace,
    draft: Draft | None,
    prompts: list[list[int]],
    max_tokens: int,
) -> dict[int, Load]:
    """Return the loads by the number of requests at a time, of a server with ``draft``."""
    name = "without" if draft is None else "with"
    requests = max(args.at_a_time)
    setting = Setting(args.python, args.base, draft, args.device, args.dtype, requests)
    engine = ENGINES[args.engine](setting)
    print(f"[serve] starting {engine.title} {name} the draft", flush=True)
    log = args.output.with_name(f"served_{name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    results = {}
    with Server(engine, log) as server:
        ask(server, prompts[0], max_tokens)  # the first request allocates and compiles
        for number in args.at_a_time:
            results[number] = load(
                server,
                prompts,
                at_a_time=number,
                max_tokens=max_tokens,
                repetitions=args.repetitions,
            )
            print(f"[serve] {number} at a time: {results[number].tokens} tokens", flush=True)
    return results


if __name__ == "__main__":
    raise SystemExit(main())
