"""Say what `megatron-eagle` makes of a base checkpoint: Megatron's flags and the description.

    megatron-eagle describe-base CKPT [--json] [--write FILE] [--vocab-size N]

Reads the arguments and tensor names in the checkpoint, runs nothing in it and changes nothing in
it. A checkpoint that says too little can be described by hand in a file of the same form.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.cli.boundary import flags_of, run


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 for a user's mistake."""
    args = _parser(prog).parse_args(argv)
    return run(
        partial(_describe, args), flags_of(args, base_description="--eagle-base-description")
    )


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="directory Megatron saved to, or one iteration of it"
    )
    parser.add_argument("--json", action="store_true", help="print the description alone, as JSON")
    parser.add_argument(
        "--write", type=Path, metavar="FILE",
        help="write it to a new file, for --eagle-base-description and --base-description",
    )  # fmt: skip
    parser.add_argument(
        "--vocab-size", type=int, metavar="N",
        help="the tokenizer's number of ids, where the checkpoint only knows the padded one",
    )  # fmt: skip
    return parser


def _describe(args: argparse.Namespace) -> int:
    from megatron_eagle.checkpoint.atomic import write_text
    from megatron_eagle.checkpoint.base_description import read_base, with_vocab_size
    from megatron_eagle.errors import UserError, literal

    if args.write is not None and args.write.exists():
        raise UserError(f"<write> {literal(args.write)}: exists already")
    base = with_vocab_size(read_base(args.checkpoint), args.vocab_size)
    text = json.dumps(base.as_dict(), indent=1)
    if args.json:
        print(text)
    else:
        print("\n".join(_lines(base)))
    if args.write is not None:
        write_text(args.write, text + "\n")
        if not args.json:
            print(f"written to {args.write}")
    return 0


def _lines(base: BaseInfo) -> list[str]:
    from megatron_eagle.training.megatron_flags import megatron_flags

    args = base.megatron_args
    lines = [
        f"{base.name}: {base.source or base.family}",
        f"{args['num_layers']} layers of width {args['hidden_size']}",
        f"{base.vocab_size:,} token ids",
        f"captured layers are counted from 0 to {args['num_layers'] - 1}{_of_pattern(args)}",
    ]
    if base.tokenizer:
        lines.append("tokenizer: " + " ".join(base.tokenizer.values()))
    lines += ["Megatron flags for this base:", shlex.join(megatron_flags(args))]
    if base.rope:
        lines.append(f"rope that no flag says: {json.dumps(base.rope)}")
    return lines


def _of_pattern(args: Mapping[str, Any]) -> str:
    """Say what a layer of a HybridModel is; nothing of a GPTModel."""
    from megatron_eagle.checkpoint.hybrid_pattern import megatron_layers, pattern_of

    pattern = pattern_of(args)
    if pattern is None:
        return ""
    pairs = megatron_layers(args) > args["num_layers"]
    return f", each {'two symbols' if pairs else 'a symbol'} of {pattern}"
