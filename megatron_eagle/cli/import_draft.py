"""Somebody's EAGLE-3 draft (Hugging Face directory) -> Megatron draft checkpoint.

    python tools/import_draft.py --hf DIR --base BASE --save CKPT

Needs no GPU and no torchrun; the result loads at any tensor-parallel size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_eagle.checkpoint.directory import load_base_json
from megatron_eagle.hf.draft.checkpoint import write_draft_checkpoint
from megatron_eagle.hf.draft.import_hf import open_hf_draft


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one `error:` line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--hf", type=Path, required=True, metavar="DIR",
        help="draft written by SafeAILab, SpecForge, ModelOpt, speculators, vLLM or this project",
    )  # fmt: skip
    parser.add_argument(
        "--base", required=True, metavar="CKPT", help="its base (tools/import_base.py)"
    )
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
    args = parser.parse_args(argv)
    try:
        base = load_base_json(args.base)
        stored = open_hf_draft(
            args.hf,
            base,
            aux_layers=tuple(args.aux_layers) if args.aux_layers else None,
            adapt=args.adapt,
            base_directory=args.base,
        )
        write_draft_checkpoint(stored, args.save)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    info = stored.info
    layers = " ".join(map(str, info.aux_layers))
    print(
        f"draft of {info.num_layers} layer(s) reading layers {layers} of {base.name!r}, "
        f"{info.draft_vocab_size:,} of {base.vocab_size:,} token ids, is in {args.save}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
