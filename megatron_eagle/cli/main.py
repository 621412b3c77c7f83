"""Dispatch ``megatron-eagle SUBCOMMAND ...`` to the command of that name.

Only the chosen command is imported, and a command imports torch and Megatron only once it runs, so
that every ``--help`` but that of ``train``, which lists Megatron's flags too, answers at once.

Several processes are started by either of

    torchrun --nproc-per-node 8 -m megatron_eagle train ...
    torchrun --nproc-per-node 8 --no-python megatron-eagle train ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from megatron_eagle.cli.slurm import several_tasks

PROGRAM = "megatron-eagle"
COMMANDS = {
    "train": ("train", "Train a draft on a frozen base inside Megatron's trainer"),
    "describe-base": ("describe_base", "Say what a checkpoint of Megatron's is as a base"),
    "import-base": ("import_base", "Convert a Hugging Face model to the checkpoint of a base"),
    "import-draft": ("import_draft", "Convert a Hugging Face draft to a draft checkpoint"),
    "prepare-data": ("prepare_data", "Tokenize chats or texts for training"),
    "regenerate": ("regenerate", "Let a model answer prompts, as training data for its draft"),
    "extract-features": ("extract_features", "Store a base's hidden states for offline training"),
    "convert": ("convert", "Export a trained draft in a format that inference servers read"),
    "stitch": ("stitch", "Put a trained next-token module into a copy of its base's files"),
    "verify": ("verify", "Check a base, a draft, features or a data set for damage"),
    "eval": ("evaluate", "Decode speculatively and measure accepted length and speed"),
}
"""Subcommand: its module in this package, and one line for the help."""
PARALLEL = ("train", "extract-features", "eval")
"""Subcommands that run on several processes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that ``argv`` (``sys.argv[1:]`` by default) begins with.

    Returns its exit status: 0, or 2 after one ``error:`` line for a user's mistake.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(_usage(), file=sys.stderr)
        return 2
    name = words[0]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name not in COMMANDS:
        choices = ", ".join(COMMANDS)
        print(f"error: {name}: no such subcommand, choose from {choices}", file=sys.stderr)
        return 2
    tasks = several_tasks()
    if tasks is not None and name not in PARALLEL:
        print(f"error: {name} runs in one process, srun started {tasks}", file=sys.stderr)
        return 2
    command = import_module(f"megatron_eagle.cli.{COMMANDS[name][0]}")
    return command.main(words[1:], f"{PROGRAM} {name}")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"usage: {PROGRAM} SUBCOMMAND ...", "", "subcommands:"]
    lines += [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", f"`{PROGRAM} SUBCOMMAND --help` lists the flags of one."]
    lines += ["Several processes: torchrun --nproc-per-node N -m megatron_eagle SUBCOMMAND ..."]
    return "\n".join(lines)
