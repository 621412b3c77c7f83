"""Convert a draft of any project, or a base's own module, to a Megatron checkpoint.

    megatron-eagle import-draft --hf DIR --base BASE --save CKPT

Needs no GPU and no torchrun; the result loads at any tensor-parallel size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_eagle.cli.boundary import add_base_flags, flags_of, run


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 for a user's mistake."""
    args = _parser(prog).parse_args(argv)
    return run(partial(_import_draft, args), flags_of(args, base_checkpoint="--base"))


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--hf", type=Path, required=True, metavar="DIR",
        help="draft written by SafeAILab, SpecForge, ModelOpt, speculators, vLLM or this project, "
        "or a base with a next-token module of its own",
    )  # fmt: skip
    add_base_flags(parser)
    parser.add_argument("--save", type=Path, required=True, help="checkpoint directory to create")
    parser.add_argument(
        "--aux-layers", type=int, nargs="+", metavar="LAYER",
        help="0-based base layers whose outputs it reads, when its config.json does not say",
    )  # fmt: skip
    parser.add_argument(
        "--adapt", action="store_true",
        help="accept a rotary embedding, norm epsilon or token embedding other than the base's, "
        "which replace them",
    )  # fmt: skip
    return parser


def _import_draft(args: argparse.Namespace) -> int:
    from megatron_eagle.checkpoint.base_description import read_base
    from megatron_eagle.hf.draft.checkpoint import write_draft_checkpoint
    from megatron_eagle.hf.draft.import_hf import open_hf_draft

    base = read_base(args.base, args.base_description)
    stored = open_hf_draft(
        args.hf,
        base,
        aux_layers=tuple(args.aux_layers) if args.aux_layers else None,
        adapt=args.adapt,
        base_directory=args.base,
    )
    write_draft_checkpoint(stored, args.save)
    info = stored.info
    layers = " ".join(map(str, info.aux_layers))
    print(
        f"draft of {info.num_layers} layer(s) reading layers {layers} of {base.name!r}, "
        f"{info.draft_vocab_size:,} of {base.vocab_size:,} token ids, is in {args.save}"
    )
    return 0
