"""Serve the quickstart's draft in vLLM's OpenAI server and compare: `make serve`.

    python benchmarks/serving/run.py --python ENGINE/bin/python [--base DIR --draft DIR]

One server without the draft and one with it, on loopback; the held-out prompts, greedy, one at a
time and eight; medians of three. Beside the server's counters stand those of `megatron-eagle eval`
(``--eval``, its ``--output``), by the rule that servers count by. Exit status 1 if an answer or a
count differs.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.serving.measure import Load, ask, load
from benchmarks.serving.server import Server

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "quickstart"


def main() -> int:
    """Run both servers and print the table."""
    args = _arguments()
    # As an exception, which ends the server too; the signal's own way leaves it running.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt_ids"] for line in lines][: args.limit]
    ours = json.loads(args.eval.read_text(encoding="utf-8"))
    if "server_accepted" not in ours:
        print(
            f"error: --eval {args.eval}: an earlier release wrote it; run eval again",
            file=sys.stderr,
        )
        return 2
    spec = {
        "method": args.method,
        "model": str(args.draft),
        "num_speculative_tokens": ours["draft_tokens"],
    }
    plain = _serve(args, None, prompts, ours["max_new_tokens"])
    drafted = _serve(args, spec, prompts, ours["max_new_tokens"])
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
    parser.add_argument("--base", type=Path, default=RUNS / "base_hf")
    parser.add_argument("--draft", type=Path, default=RUNS / "draft_hf")
    parser.add_argument("--eval", type=Path, default=RUNS / "eval_trained.json")
    parser.add_argument("--method", default="eagle3", help="eagle for an EAGLE-1 draft")
    data = ROOT / "examples" / "quickstart" / "data" / "eval.jsonl"
    parser.add_argument("--prompts", type=Path, default=data, help="JSONL of prompt_ids")
    parser.add_argument("--limit", type=int, default=40, help="use only the first prompts")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32", help="answers are comparable in float32 only")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--at-a-time", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--output", type=Path, default=RUNS / "served.json")
    args = parser.parse_args()
    for path in (args.base, args.draft, args.eval):
        if not path.exists():
            parser.error(f"{path} is missing: `make train` makes it")
    return args


def _serve(
    args: argparse.Namespace,
    spec: dict[str, Any] | None,
    prompts: list[list[int]],
    max_tokens: int,
) -> dict[int, Load]:
    """Return the loads by the number of requests at a time, of a server with ``spec``."""
    name = "without" if spec is None else "with"
    print(f"[serve] starting vLLM {name} the draft", flush=True)
    log = args.output.with_name(f"served_{name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    results = {}
    with Server(
        python=args.python,
        base=args.base,
        speculative=spec,
        device=args.device,
        dtype=args.dtype,
        requests=max(args.at_a_time),
        log=log,
    ) as server:
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


def table(
    plain: dict[int, Load], drafted: dict[int, Load], ours: dict[str, Any], whole: bool
) -> tuple[str, list[str]]:
    """Return the Markdown tables, and a line for everything that should be equal and is not.

    ``whole``: the server got all the prompts that ``ours`` is about, so that they compare.
    """
    rows = [["", "without draft", "with draft", "ratio"], ["---"] * 4]
    wrong = []
    for number, without in plain.items():
        speed_rows, differing = _speeds(number, without, drafted[number])
        rows += speed_rows
        wrong += differing
        for name, way in (("without", without), ("with", drafted[number])):
            if way.unlike_first:
                wrong.append(f"{number} at a time {name} the draft, repetitions differ")
    rows += [[], ["", "server", "ours, same rule", "ours"], ["---"] * 4]
    for number, with_draft in drafted.items():
        count_rows, equal = _counts(number, with_draft.counts, ours)
        rows += count_rows if whole else [[*row[:2], "", ""] for row in count_rows]
        if whole and not equal:
            wrong.append(f"{number} at a time, the server counts otherwise than we do")
    return "\n".join(f"| {' | '.join(row)} |" if row else "" for row in rows), wrong


def _speeds(number: int, without: Load, with_draft: Load) -> tuple[list[list[str]], list[str]]:
    """Return the rows on speed and answers of ``number`` requests at a time, and differences."""
    at = "one prompt at a time" if number == 1 else f"{number} at a time"
    rates = [x.tokens_per_second for x in (without, with_draft)]
    cpu = [statistics.median(x.cpu_seconds) for x in (without, with_draft)]
    pairs = list(zip(without.answers, with_draft.answers, strict=True))
    equal = sum(a == b for a, b in pairs)
    rows = [
        [f"{at}: {name}", *(f"{x:.1f}" for x in values), f"{values[1] / max(values[0], 1e-9):.2f}"]
        for name, values in (("tokens/s", rates), ("CPU seconds", cpu))
    ]
    rows.append([f"{at}: equal answers", "", f"{equal} of {len(pairs)}", ""])
    different = len(pairs) - equal
    return rows, [f"{at}, {different} of {len(pairs)} answers differ with the draft"][:different]


def _counts(
    number: int, counts: dict[str, int], ours: dict[str, Any]
) -> tuple[list[list[str]], bool]:
    """Return the rows on what the server counted, and whether it is what we count."""
    verifications = counts["verifications"]
    accepted = [counts[f"accepted_{i}"] for i in range(len(counts) - 1)]
    length = 1 + sum(accepted) / max(1, verifications)
    expected = (ours["verifications"], ours["server_accepted"])
    rows = [
        [
            f"accepted length, {number} at a time", f"{length:.4f}",
            f"{ours['server_accepted_length']:.4f}", f"{ours['accepted_length']:.4f}",
        ],
        [
            "verifications; accepted per position", f"{verifications}; {_words(accepted)}",
            f"{expected[0]}; {_words(expected[1])}", f"{expected[0]}; {_words(ours['accepted'])}",
        ],
    ]  # fmt: skip
    return rows, (verifications, accepted) == expected


def _words(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


if __name__ == "__main__":
    raise SystemExit(main())
