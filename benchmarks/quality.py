"""The quality study: drafts that differ in one thing each, trained on equal tokens, compared.

    python benchmarks/quality.py                  # on the quickstart's base, after `make train`
    python benchmarks/quality.py --only kl-k3 lk-alpha --train-iters 400

Every variant is trained with the quickstart's recipe for the same number of answers and evaluated
on held-out prompts with chains of the same length. A stopped study goes on where it was: trainings
resume from their checkpoints, and finished variants are not run again. One seed each: differences
below 0.03 in accepted length are a tie. Writes results.json, quality.md and quality.png.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quality_report import write_results
from megatron_eagle.checkpoint.atomic import atomic_file
from megatron_eagle.platform import recommended_environment

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "runs" / "quickstart"
DATA = ROOT / "examples" / "quickstart" / "data"
DRAFT_TOKENS = 3
COMMON = {"--eagle-ttt-steps": "3", "--eagle-draft-vocab-size": "8192"}
VARIANTS: dict[str, dict[str, str | None]] = {
    "kl-k3": {},
    "kl-k3, seed 2": {"--seed": "4321"},
    "kl-k1": {"--eagle-ttt-steps": "1"},
    "kl-k5": {"--eagle-ttt-steps": "5"},
    "lk-alpha": {"--eagle-loss": "lk-alpha"},
    "lk-lambda": {"--eagle-loss": "lk-lambda"},
    "eagle3.1": {"--eagle-algorithm": "eagle3.1"},
    "base-init": {"--eagle-init-from-base": ""},
    "base-init, lk-lambda": {"--eagle-init-from-base": "", "--eagle-loss": "lk-lambda"},
    "base-init, 2 layers": {"--eagle-init-from-base": "", "--eagle-num-layers": "2"},
    "base-init, lr 1e-3": {"--eagle-init-from-base": "", "--lr": "1e-3"},
    "vocab-4k": {"--eagle-draft-vocab-size": "4096"},
    "vocab-full": {"--eagle-draft-vocab-size": None},
}
"""Flags that differ from ``COMMON``; None takes one away, and a switch has an empty value."""


def main() -> int:
    """Run what is missing of the chosen variants and write what is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality", metavar="DIR")
    parser.add_argument("--base", type=Path, default=QUICKSTART / "base", metavar="DIR")
    parser.add_argument("--base-hf", type=Path, default=QUICKSTART / "base_hf", metavar="DIR")
    parser.add_argument("--train-data", type=Path, default=DATA / "train.jsonl", metavar="FILE")
    parser.add_argument("--prompts", type=Path, default=DATA / "eval.jsonl", metavar="FILE")
    parser.add_argument("--train-iters", type=int, default=600, help="one answer per iteration")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=2, metavar="TP")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="VARIANT")
    args = parser.parse_args()
    for needed in (args.base, args.base_hf, args.train_data, args.prompts):
        if not needed.exists():
            print(f"error: {needed} is missing; `make train` makes it", file=sys.stderr)
            return 2
    try:
        for name in args.only or VARIANTS:
            run_variant(name, args)
    except subprocess.CalledProcessError as error:
        print(f"error: {error.cmd[-1]} and the log beside it tell why", file=sys.stderr)
        return 1
    folders = {name: _folder(name, args) for name in VARIANTS}
    write_results(args.runs, folders, VARIANTS)
    return 0


def flags_of(name: str) -> list[str]:
    """Return the draft's flags of a variant."""
    chosen = {**COMMON, **VARIANTS[name]}
    given = [(flag, value) for flag, value in chosen.items() if value is not None]
    return [word for pair in given for word in pair if word]


def _folder(name: str, args: argparse.Namespace) -> Path:
    runs: Path = args.runs.resolve()
    return runs / f"{name.replace(', ', '-').replace(' ', '-')}-{args.train_iters}"


def run_variant(name: str, args: argparse.Namespace) -> None:
    """Train and evaluate ``name`` unless both are done."""
    folder = _folder(name, args)
    report = folder / "eval.json"
    if report.exists():
        print(f"[{name}] done before", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"[{name}] ...", flush=True)
    recipe = f"""
        --tensor-model-parallel-size {args.tensor_model_parallel_size} --seq-length 192
        --micro-batch-size 1 --global-batch-size 1 --train-iters {args.train_iters}
        --lr 2e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-fraction 0.04
        --weight-decay 0 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
        --log-interval 10 --save-interval 200 --num-workers 0 --seed 1234
        --tokenizer-type HuggingFaceTokenizer
    """.split()
    draft = folder / "draft"
    if not (draft / f"iter_{args.train_iters:07d}" / "metadata.json").exists():
        _torchrun(
            args, folder / "train.log", "examples/pretrain_eagle.py", *recipe, *flags_of(name),
            "--tokenizer-model", args.base_hf, "--eagle-base-checkpoint", args.base,
            "--eagle-train-data", args.train_data, "--eagle-log-file", folder / "curve.jsonl",
            "--save", draft, "--load", draft,
        )  # fmt: skip
    with atomic_file(report) as partial:
        _torchrun(
            args, folder / "eval.log", "tools/eval_acceptance.py", "--base", args.base,
            "--draft", draft, "--prompts", args.prompts, "--draft-tokens", DRAFT_TOKENS,
            "--output", partial,
        )  # fmt: skip


def _torchrun(args: argparse.Namespace, log: Path, script: str, *words: object) -> None:
    ranks = args.tensor_model_parallel_size
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(ROOT / script), *map(str, words)]
    environment = {
        **recommended_environment(ranks),
        **os.environ,
        "PYTHONPATH": str(ROOT),
    }
    with log.open("a") as output:
        subprocess.run(command, check=True, env=environment, cwd=ROOT, stdout=output, stderr=output)


if __name__ == "__main__":
    sys.exit(main())
