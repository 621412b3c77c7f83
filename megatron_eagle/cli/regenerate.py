"""Write a base's own answers to prompts, as training data for its draft.

    megatron-eagle regenerate --model HF_DIR --prompts prompts.jsonl --output answers.jsonl

Runs the model through transformers. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_eagle.checkpoint.atomic import owned_output
from megatron_eagle.cli.boundary import LARGEST_COUNT, at_least_one, flags_of, run
from megatron_eagle.errors import UserError

LOWEST_TEMPERATURE = 1e-4
"""Temperature below which the quotients leave half precision."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 for a user's mistake."""
    args = _parser(prog).parse_args(argv)
    return run(partial(_regenerate, args), flags_of(args))


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL of prompts or messages")
    parser.add_argument("--output", type=Path, required=True, help="JSONL, appended to")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"],
        help="the model computes in (default: bfloat16 with a CUDA device, otherwise float32)",
    )  # fmt: skip
    return parser


def _regenerate(args: argparse.Namespace) -> int:
    at_least_one(args, "max_new_tokens", "batch_size")
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"<temperature> {args.temperature} must be a number of 0 or more")
    if not 0 <= args.seed <= LARGEST_COUNT:
        raise UserError(f"<seed> {args.seed} must be from 0 to {LARGEST_COUNT}")
    if 0 < args.temperature < LOWEST_TEMPERATURE:
        raise UserError(f"<temperature> {args.temperature} is too low to divide by; 0 is greedy")
    import torch

    from megatron_eagle.data.regenerate import Generation, read_prompts, regenerate
    from megatron_eagle.hf.files.model_digest import model_digest
    from megatron_eagle.hf.files.pretrained import load_hf_model, load_hf_tokenizer

    prompts = read_prompts(args.prompts)
    if not (args.model / "config.json").is_file():
        raise UserError(f"<model> {args.model}: not a Hugging Face model directory")
    on_gpu = torch.cuda.is_available()
    dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    generation = Generation(
        args.max_new_tokens, args.batch_size, args.temperature, args.seed, dtype
    )
    with owned_output(args.output, "output"):
        tokenizer = load_hf_tokenizer(args.model, "model")
        model = load_hf_model(args.model, "model", getattr(torch, dtype))
        if on_gpu:
            model = model.cuda()
        regenerate(
            model,
            tokenizer,
            prompts,
            args.output,
            generation,
            lambda text: print(text, flush=True),
            model_digest(args.model),
        )
    return 0
