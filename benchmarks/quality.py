"""The quality study: drafts that differ in one thing each, trained on equal tokens, compared.

    python benchmarks/quality.py                  # EAGLE drafts, on the quickstart's base
    python benchmarks/quality.py --group blocks   # DFlash, DSpark, MTP and EAGLE-3
    python benchmarks/quality.py --only kl-k3 lk-alpha --train-iters 400

It needs the base and the data of `make train`. Every variant is trained with the quickstart's
recipe for the same number of answers and evaluated on held-out prompts; some of the blocks' group
are then trained again, for as many answers as take an equal FLOP. A stopped study goes on where it
was: trainings resume from their checkpoints, and finished variants are not run again. One seed
each: differences below 0.03 in accepted length are a tie. Writes results, a table and a plot.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quality_flop import Answers, Sizes, matched_iterations
from benchmarks.quality_report import Result, write_results
from benchmarks.quality_variants import GROUPS, Group
from megatron_eagle.checkpoint.atomic import atomic_file
from megatron_eagle.platform import recommended_environment

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "runs" / "quickstart"
DATA = ROOT / "examples" / "quickstart" / "data"
SEQ_LENGTH = 192


@dataclass(frozen=True)
class Run:
    """A training of a variant and its evaluation. ``flop``: of an answer, if it is counted."""

    name: str
    variant: str
    iterations: int
    flop: float | None = None


def main() -> int:
    """Run what is missing of the chosen variants and write what is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--group", choices=GROUPS, default="eagle", help="variants to compare")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality", metavar="DIR")
    parser.add_argument("--base", type=Path, default=QUICKSTART / "base", metavar="DIR")
    parser.add_argument("--base-hf", type=Path, default=QUICKSTART / "base_hf", metavar="DIR")
    parser.add_argument("--train-data", type=Path, default=DATA / "train.jsonl", metavar="FILE")
    parser.add_argument("--prompts", type=Path, default=DATA / "eval.jsonl", metavar="FILE")
    parser.add_argument("--train-iters", type=int, help="one answer per iteration")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=2, metavar="TP")
    parser.add_argument("--only", nargs="+", metavar="VARIANT")
    args = parser.parse_args()
    for needed in (args.base, args.base_hf, args.train_data, args.prompts):
        if not needed.exists():
            print(f"error: {needed} is missing; `make train` makes it", file=sys.stderr)
            return 2
    group = GROUPS[args.group]
    runs = runs_of(group, args)
    if unknown := set(args.only or ()) - {run.name for run in runs}:
        names = "; ".join(run.name for run in runs)
        print(f"error: --only {sorted(unknown)[0]!r} is none of {names}", file=sys.stderr)
        return 2
    try:
        for run in runs:
            if run.name in (args.only or [run.name]):
                train_and_evaluate(run, group, args)
    except subprocess.CalledProcessError as error:
        print(f"error: {error.cmd[-1]} and the log beside it tell why", file=sys.stderr)
        return 1
    done = [(run, _folder(run, args)) for run in runs]
    results = {
        run.name: Result.read(folder, group, run.variant, run.iterations, run.flop)
        for run, folder in done
        if (folder / "eval.json").exists()
    }
    write_results(args.runs, args.group, results)
    return 0


def runs_of(group: Group, args: argparse.Namespace) -> list[Run]:
    """Return the trainings of a group: on equal tokens, then of equal FLOP."""
    iterations = args.train_iters or group.iterations
    if group.reference is None:
        return [Run(name, name, iterations) for name in group.variants]
    sizes, answers = Sizes.of(args.base), Answers.read(args.train_data, SEQ_LENGTH)
    flop = {name: answers.mean_flop(sizes, group.flags(name)) for name in group.variants}
    most = flop[group.reference]
    equal_tokens = [Run(name, name, iterations, each) for name, each in flop.items()]
    return equal_tokens + [
        Run(
            f"{name}, equal FLOP",
            name,
            matched_iterations(iterations, most, flop[name]),
            flop[name],
        )
        for name in group.matched
    ]


def _folder(run: Run, args: argparse.Namespace) -> Path:
    runs: Path = args.runs.resolve()
    return runs / f"{run.variant.replace(', ', '-').replace(' ', '-')}-{run.iterations}"


def train_and_evaluate(run: Run, group: Group, args: argparse.Namespace) -> None:
    """Train and evaluate ``run`` unless both are done."""
    folder = _folder(run, args)
    report = folder / "eval.json"
    if report.exists():
        print(f"[{run.name}] done before", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"[{run.name}] ...", flush=True)
    data: list[object] = ["--eagle-train-data", args.train_data]
    if group.reads_stored_features(run.variant):
        data = ["--eagle-offline-features", _stored_features(group, args)]
    recipe = f"""
        --tensor-model-parallel-size {args.tensor_model_parallel_size} --seq-length {SEQ_LENGTH}
        --micro-batch-size 1 --global-batch-size 1 --train-iters {run.iterations}
        --lr 2e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-fraction 0.04
        --weight-decay 0 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
        --log-interval 10 --save-interval 50 --num-workers 0 --seed 1234
        --tokenizer-type HuggingFaceTokenizer
    """.split()
    flags = [word for pair in group.flags(run.variant).items() for word in " ".join(pair).split()]
    draft = folder / "draft"
    if not (draft / f"iter_{run.iterations:07d}" / "metadata.json").exists():
        _torchrun(
            args, folder / "train.log", "examples/pretrain_eagle.py", *recipe, *flags, *data,
            "--tokenizer-model", args.base_hf, "--eagle-base-checkpoint", args.base,
            "--eagle-log-file", folder / "curve.jsonl", "--save", draft, "--load", draft,
        )  # fmt: skip
    with atomic_file(report) as partial:
        _torchrun(
            args, folder / "eval.log", "tools/eval_acceptance.py", "--base", args.base,
            "--draft", draft, "--prompts", args.prompts, *group.evaluation, "--output", partial,
        )  # fmt: skip


def _stored_features(group: Group, args: argparse.Namespace) -> Path:
    """Return where the outputs of the base's layers on the data are, which are made if missing."""
    folder: Path = args.runs.resolve() / "features"
    if not (folder / "index.json").exists():
        print("[features] ...", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _torchrun(
            args, folder.parent / "features.log", "tools/extract_features.py", "--base", args.base,
            "--data", args.train_data, "--seq-length", SEQ_LENGTH, "--shard-mib", 64,
            "--aux-layers", *group.aux_layers, "--output", folder,
            "--tensor-model-parallel-size", args.tensor_model_parallel_size,
        )  # fmt: skip
    return folder


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
