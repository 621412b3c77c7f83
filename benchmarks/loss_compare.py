"""Does the parallel layout change the result? Train one draft in several layouts and compare.

    python benchmarks/loss_compare.py --layouts tp1,tp2,tp2sp,cp2,pp2,dp2do --train-iters 20

Makes a random base of the given sizes (or takes --base), random answers and one initial draft;
trains from them in every layout, each in processes of its own on this machine's CPUs or GPUs; and
prints the largest relative difference from the first layout, over all iterations, of the loss and
the gradient norm, of every step's accuracy (absolute), and of the final weights of the draft.
Exit status 1 if a difference exceeds --tolerance, 2 for a mistake.

A layout joins parts of: tp pp cp dp ep etp (each with its size), sp (sequence parallelism), do
(distributed optimizer, gradient reduction and parameter gathering overlapped). Flags after `--` go
to every run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eagle.platform import recommended_environment

ROOT = Path(__file__).resolve().parents[1]
SIZE_FLAGS = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "cp": "--context-parallel-size",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
}
SWITCHES = {
    "sp": ["--sequence-parallel"],
    "do": ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
}


@dataclass(frozen=True)
class Layout:
    """A name such as ``tp2pp2do``, the processes it needs and Megatron's flags for it."""

    name: str
    processes: int
    flags: list[str]

    @classmethod
    def parse(cls, name: str) -> Layout:
        parts = re.findall(r"(etp|tp|pp|cp|dp|ep|sp|do)(\d*)", name)
        if not parts or "".join(a + b for a, b in parts) != name:
            raise ValueError(f"--layouts {name}: not a layout")
        sizes, flags = dict.fromkeys(("tp", "pp", "cp", "dp", "ep"), 1), []
        for kind, size in parts:
            if kind in SWITCHES and not size:
                flags += SWITCHES[kind]
            elif (kind in SIZE_FLAGS or kind == "dp") and size:
                sizes[kind] = int(size)
                flags += [SIZE_FLAGS[kind], size] if kind != "dp" else []
            else:
                raise ValueError(f"--layouts {name}: {kind}{size} is not a part of a layout")
        # Expert parallelism takes its ranks from the data- and context-parallel ones.
        copies = max(sizes["dp"] * sizes["cp"], sizes["ep"])
        return cls(name, sizes["tp"] * sizes["pp"] * copies, flags)


@dataclass(frozen=True)
class Outcome:
    """What one run left: metrics of every iteration, the draft's final weights by name."""

    layout: Layout
    metrics: list[dict[str, float]]
    weights: dict[str, Any]
    seconds: float


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.work or Path(scratch)
        try:
            layouts = [Layout.parse(name) for name in args.layouts.split(",")]
            return compare(args, layouts, folder)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2


def parse(argv: list[str]) -> argparse.Namespace:
    own, extra = (
        (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layouts", required=True, metavar="A,B,...", help="the first is compared with"
    )
    parser.add_argument(
        "--base",
        type=Path,
        help="a base checkpoint (imported, or of Megatron's own), not a random one",
    )
    for name, default in (
        ("num-layers", 12), ("hidden-size", 64), ("ffn-hidden-size", 128), ("seed", 7),
        ("num-attention-heads", 8), ("num-query-groups", 4), ("vocab-size", 509),
        ("seq-length", 64), ("micro-batch-size", 1), ("global-batch-size", 8), ("train-iters", 20),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--draft-vocab-size", type=int, default=256)
    parser.add_argument("--num-experts", type=int, help="a Mixtral of top-2 experts, not a Llama")
    parser.add_argument("--untied", action="store_true", help="a base with its own output layer")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative; default: 1e-5")
    parser.add_argument("--output", type=Path, help="write the table here too")
    parser.add_argument("--work", type=Path, help="keep bases, logs and checkpoints here")
    args = parser.parse_args(own)
    args.extra = extra
    return args


def compare(args: argparse.Namespace, layouts: list[Layout], folder: Path) -> int:
    """Run all layouts, print the table, return the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    base = args.base or make_base(args, folder)
    write_answers(args, base, folder / "answers.jsonl")
    # One iteration at a learning rate of almost nothing: a checkpoint of the initial draft.
    run(
        args, Layout.parse("tp1"), base, folder, "initial", ["--lr", "1e-9", "--exit-interval", "1"]
    )
    rows, worst, reference = [], 0.0, None
    for layout in layouts:
        start = ["--load", str(folder / "initial"), "--finetune"]
        outcome = run(args, layout, base, folder, layout.name, start)
        reference = reference or outcome
        row = differences(reference, outcome)
        worst = max(worst, *row.values())
        rows.append((outcome, row))
        print(f"{layout.name}: {outcome.seconds:.0f} s, " + shown(row, ", "), flush=True)
    text = table(rows)
    print("\n" + text)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")
    print(f"largest difference {worst:.1e}, tolerance {args.tolerance:.1e}")
    return int(worst > args.tolerance)


def run(
    args: argparse.Namespace, layout: Layout, base: Path, folder: Path, name: str, words: list[str]
) -> Outcome:
    """Train in ``layout``; raises ``ValueError`` with the end of its output if that fails."""
    save, log = folder / name, folder / f"{name}.jsonl"
    shutil.rmtree(save, ignore_errors=True)
    log.unlink(missing_ok=True)
    copied = ("seq-length", "micro-batch-size", "global-batch-size", "train-iters", "seed")
    values = {f"--{key}": str(getattr(args, key.replace("-", "_"))) for key in copied}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(layout.processes), str(ROOT / "examples" / "pretrain_eagle.py")),
        *("--eagle-base-checkpoint", str(base)),
        *("--eagle-train-data", str(folder / "answers.jsonl")),
        *("--eagle-draft-vocab-size", str(args.draft_vocab_size), "--eagle-log-file", str(log)),
        # Adam moves a weight whose gradient is rounding noise by a whole learning rate, unless its
        # epsilon is above the noise.
        *("--lr", "1e-3", "--lr-decay-style", "constant", "--adam-eps", "1e-5"),
        *("--log-interval", "1"),
        *("--num-workers", "0", "--save", str(save), "--save-interval", str(args.train_iters)),
        *itertools.chain(*values.items()), *layout.flags, *args.extra, *words,
    ]  # fmt: skip
    started = time.monotonic()
    done = subprocess.run(
        command,
        env={**recommended_environment(layout.processes), **os.environ},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
        raise ValueError(f"{layout.name}: " + (errors[0] if errors else done.stdout[-3000:]))
    metrics = [json.loads(line) for line in log.read_text().splitlines()]
    return Outcome(layout, metrics, draft_weights(save), time.monotonic() - started)


def draft_weights(save: Path) -> dict[str, Any]:
    """Read the draft's floating-point tensors by name, whole, whatever layout saved them."""
    from megatron_eagle.checkpoint.reader import CheckpointReader

    checkpoint = CheckpointReader.open(save)
    names = checkpoint.keys()
    tensors = checkpoint.load([name for name in names if name.startswith("draft.")])
    return {key: value for key, value in tensors.items() if value.is_floating_point()}


def differences(reference: Outcome, found: Outcome) -> dict[str, float]:
    """Column -> largest difference; relative to the larger value (weights: to their tensor's
    largest), accuracies as they are."""
    if len(reference.metrics) != len(found.metrics):
        raise ValueError(f"{found.layout.name}: {len(found.metrics)} iterations were logged")
    pairs = list(zip(reference.metrics, found.metrics, strict=True))
    row = {}
    for key in ("loss", "grad_norm"):
        row[key] = max(abs(a[key] - b[key]) / max(abs(a[key]), 1e-12) for a, b in pairs)
    accuracies = [key for key in reference.metrics[0] if key.startswith("accuracy_")]
    row["accuracy"] = max(abs(a[key] - b[key]) for a, b in pairs for key in accuracies)
    row["weights"] = max(
        float((value - found.weights[key]).abs().max() / value.abs().max())
        for key, value in reference.weights.items()
    )
    return row


def shown(row: dict[str, float], separator: str) -> str:
    return separator.join(f"{key} {value:.1e}" for key, value in row.items())


def table(rows: list[tuple[Outcome, dict[str, float]]]) -> str:
    """Markdown."""
    lines = ["| layout | processes | loss | gradient norm | accuracy | final weights |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for outcome, row in rows:
        cells = [outcome.layout.name, str(outcome.layout.processes)]
        cells += [f"{row[key]:.1e}" for key in ("loss", "grad_norm", "accuracy", "weights")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def make_base(args: argparse.Namespace, folder: Path) -> Path:
    """Make and import a random Llama, or Mixtral, of the given sizes."""
    import torch
    import transformers

    from megatron_eagle.hf.base.import_base import import_base

    torch.manual_seed(args.seed)
    kind, experts = "Llama", {}
    if args.num_experts is not None:
        kind, experts = "Mixtral", {"num_local_experts": args.num_experts}
    config = getattr(transformers, f"{kind}Config")(
        **experts,
        num_hidden_layers=args.num_layers,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_query_groups,
        vocab_size=args.vocab_size,
        max_position_embeddings=args.seq_length,
        tie_word_embeddings=not args.untied,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Larger than a fresh model's, so that the base prefers some tokens clearly.
            weight.normal_(0.0, 0.1).add_(1.0 if name.endswith("norm.weight") else 0.0)
    for path in (folder / "base_hf", folder / "base"):
        shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(folder / "base_hf")
    import_base(folder / "base_hf", folder / "base")
    return folder / "base"


def write_answers(args: argparse.Namespace, base: Path, file: Path) -> None:
    """Random prompts and answers of ragged lengths, within the base's vocabulary."""
    from megatron_eagle.checkpoint.base_description import read_base

    vocabulary, rng = read_base(base).vocab_size, random.Random(args.seed)
    longest = args.seq_length - 8

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(rng.randint(low, high))]

    with file.open("w", encoding="utf-8") as out:
        for _ in range(4 * args.global_batch_size):
            record = {"prompt_ids": ids(2, 8), "answer_ids": ids(longest // 3, longest)}
            out.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
