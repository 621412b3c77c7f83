"""Convert a Hugging Face model directory to the Megatron checkpoint of a frozen base.

    megatron-eagle import-base --hf DIR --save CKPT

Needs no GPU and no torchrun; the result loads at any tensor-, pipeline- and expert-parallel size.
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_eagle.checkpoint.directory import BASE_JSON_NAME
from megatron_eagle.cli.boundary import flags_of, run


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument("--save", type=Path, required=True, help="checkpoint directory to create")
    parser.add_argument(
        "--base-name",
        metavar="NAME",
        help="of the base in exported drafts, by which vLLM and speculators find it (default: its "
        "id if DIR is in the hub's cache, else the path of DIR)",
    )
    args = parser.parse_args(argv)
    return run(partial(_import_base, args), flags_of(args))


def _import_base(args: argparse.Namespace) -> int:
    from megatron_eagle.hf.base.import_base import import_base
    from megatron_eagle.training.megatron_flags import megatron_flags

    started = time.monotonic()

    def progress(line: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {line}", flush=True)

    base = import_base(args.hf, args.save, progress, args.base_name)
    progress(f"{base.family} base {base.name!r} is in {args.save}")
    print("Megatron flags for this base:")
    print(shlex.join(megatron_flags(base.megatron_args)))
    if base.rope:
        print(f"No flag says its rope: `megatron-eagle train` reads it from {BASE_JSON_NAME}")
    return 0
