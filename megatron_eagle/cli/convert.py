"""Trained draft (Megatron checkpoint) -> Hugging Face EAGLE-3 directory for an inference server.

    python tools/convert_to_hf.py --load CKPT --output DIR [--format sglang] [--eval figures.json]

Needs no GPU and no torchrun, whatever layout the draft was trained in.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from megatron_eagle.hf.draft.card import algorithm_name, read_evaluation
from megatron_eagle.hf.draft.export import DTYPES, export_draft
from megatron_eagle.hf.draft.formats import FORMATS


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one `error:` line on stderr."""
    args = _parser().parse_args(argv)
    try:
        info = export_draft(
            args.load,
            args.output,
            dtype=DTYPES[args.dtype] if args.dtype else None,
            overwrite=args.overwrite,
            progress=print,
            fmt=FORMATS[args.format],
            data=args.data,
            evaluation=read_evaluation(args.eval) if args.eval else None,
            check=partial(_verify, args.load) if args.verify else (lambda directory: None),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{algorithm_name(info)} draft for {info.base.name!r} is in {args.output}")
    return 0


def _verify(load: Path, exported: Path) -> None:
    """Compare the finished files with the checkpoint's draft, before they get their name."""
    from megatron_eagle.platform import enable

    enable()
    from megatron_eagle.cli.process_groups import start
    from megatron_eagle.decode.load import read_draft
    from megatron_eagle.decode.verify import STEPS, check_export

    groups = start(seed=0)
    try:
        difference = check_export(read_draft(load, f"--load {load}"), load, exported, groups)
    finally:
        torch.distributed.destroy_process_group()
    print(f"verified: {STEPS} steps equal the checkpoint's draft to {difference:.1e}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--load",
        type=Path,
        required=True,
        metavar="CKPT",
        help="directory training saved to (its latest iteration is taken), its best/, or one iter_ "
        "directory",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="directory to create"
    )
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        default="hf",
        help="hf (default) is read by vLLM, SGLang, TensorRT-LLM and SpecForge alike; the others "
        "hold what one reader wants, and drafts that the rest cannot run",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights (default: as saved)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export in --output"
    )
    parser.add_argument("--data", metavar="TEXT", help="training data, for the model card")
    parser.add_argument(
        "--eval",
        type=Path,
        metavar="FILE",
        help="--output of tools/eval_acceptance.py: accepted length, for the model card (default: "
        "what training measured, of a draft in SAVE/best)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the files back in plain PyTorch and compare logits with the checkpoint's draft",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
