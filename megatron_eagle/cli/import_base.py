"""Hugging Face model directory -> Megatron checkpoint of the frozen base.

    python tools/import_base.py --hf DIR --save CKPT

Needs no GPU and no torchrun; the result loads at any tensor- and pipeline-parallel size.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from megatron_eagle.checkpoint.directory import BASE_JSON_NAME
from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.training.megatron_flags import megatron_flags


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one `error:` line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument("--save", type=Path, required=True, help="checkpoint directory to create")
    args = parser.parse_args(argv)
    started = time.monotonic()

    def progress(line: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {line}", flush=True)

    try:
        base = import_base(args.hf, args.save, progress)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    progress(f"{base.family} base {base.name!r} is in {args.save}")
    print("Megatron flags for this base:")
    print(shlex.join(megatron_flags(base.megatron_args)))
    if base.rope:
        print(f"No flag says its rope: examples/pretrain_eagle.py reads it from {BASE_JSON_NAME}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
