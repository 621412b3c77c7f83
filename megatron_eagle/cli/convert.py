"""Export a trained draft (Megatron checkpoint) as the directory of an inference server.

    megatron-eagle convert --load CKPT --output DIR [--format sglang] [--eval figures.json]

Needs no GPU and no torchrun, whatever layout the draft was trained in.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_eagle.cli.boundary import flags_of, run

FORMATS = ("hf", "vllm", "sglang", "trtllm", "speculators")
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 for a user's mistake."""
    args = _parser(prog).parse_args(argv)
    flag_of = flags_of(
        args,
        attention="--eagle-attention",
        q_lora_rank="--eagle-q-lora-rank",
        qk_layernorm="--eagle-qk-layernorm",
        norm_before_fc="--eagle-norm-before-fc",
        norm_before_residual="--eagle-norm-before-residual",
    )
    return run(partial(_convert, args), flag_of)


def _convert(args: argparse.Namespace) -> int:
    from megatron_eagle.hf.draft import export
    from megatron_eagle.hf.draft.card import algorithm_name
    from megatron_eagle.hf.draft.figures import read_evaluation
    from megatron_eagle.hf.draft.formats import FORMATS as formats
    from megatron_eagle.hf.draft.formats import format_notes

    info = export.export_draft(
        args.load,
        args.output,
        dtype=export.DTYPES[args.dtype] if args.dtype else None,
        overwrite=args.overwrite,
        progress=print,
        fmt=formats[args.format],
        data=args.data,
        base_name=args.base_name,
        base_note=args.base_note,
        hf_config=args.hf_config,
        evaluation=read_evaluation(args.eval) if args.eval else None,
        check=partial(_verify, args.load) if args.verify else (lambda directory: None),
    )
    for note in format_notes(formats[args.format], info):
        print(f"note: {note}")
    print(f"{algorithm_name(info)} draft for {info.base.name!r} is in {args.output}")
    return 0


def _verify(load: Path, exported: Path) -> None:
    """Compare the finished files with the checkpoint's draft, before they get their name."""
    import torch

    from megatron_eagle.platform import enable

    enable()
    from megatron_eagle.cli.process_groups import start
    from megatron_eagle.decode.load import read_draft
    from megatron_eagle.decode.verify import check_export, compared

    groups = start(seed=0)
    try:
        about = read_draft(load, f"<load> {load}")
        difference = check_export(about, load, exported, groups)
    finally:
        torch.distributed.destroy_process_group()
    print(f"verified: {compared(about)} equal the checkpoint's draft to {difference:.1e}")


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
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
        choices=FORMATS,
        default="hf",
        help="hf (default) is read by vLLM, SGLang, TensorRT-LLM and SpecForge alike; the others "
        "hold what one reader wants, and drafts that the rest cannot run",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as saved)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export in --output"
    )
    parser.add_argument("--data", metavar="TEXT", help="training data, for the model card")
    parser.add_argument(
        "--base-name",
        metavar="NAME",
        help="what users of the base type for it (default: the name that import-base gave it)",
    )
    parser.add_argument(
        "--base-note",
        metavar="TEXT",
        help="for the model card: which files of the base go with the draft, if not those that the "
        "name stands for",
    )
    parser.add_argument(
        "--hf-config",
        type=Path,
        metavar="DIR",
        help="Hugging Face directory of the base, for what the arguments of a base that Megatron "
        "trained do not say; where both speak they must agree",
    )
    parser.add_argument(
        "--eval",
        type=Path,
        metavar="FILE",
        help="--output of `megatron-eagle eval`: accepted length, for the model card (default: "
        "what training measured, of a draft in SAVE/best)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the files back in plain PyTorch and compare logits with the checkpoint's draft",
    )
    return parser
