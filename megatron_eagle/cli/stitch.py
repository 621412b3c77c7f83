"""Put a converted next-token module (MTP) into a copy of its base's Hugging Face files.

    megatron-eagle stitch --hf BASE --module CONVERTED --save DIR

Needs no GPU and no torchrun; the copy takes as much disk as the base.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_eagle.cli.boundary import flags_of, run


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--hf", type=Path, required=True, metavar="DIR", help="Hugging Face directory of the base"
    )
    parser.add_argument(
        "--module", type=Path, required=True, metavar="DIR",
        help="what `megatron-eagle convert` wrote of a draft of --eagle-algorithm mtp",
    )  # fmt: skip
    parser.add_argument("--save", type=Path, required=True, help="directory to create")
    args = parser.parse_args(argv)
    return run(partial(_stitch, args), flags_of(args))


def _stitch(args: argparse.Namespace) -> int:
    from megatron_eagle.hf.base.stitch import stitch

    count = stitch(args.hf, args.module, args.save, partial(print, flush=True))
    print(f"{args.save}: the base with {count} tensors of {args.module}")
    return 0
