"""Write a base's own answers to prompts, as training data for its draft.

python tools/regenerate.py --model HF_DIR --prompts prompts.jsonl --output answers.jsonl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_eagle.data.regenerate import Generation, read_prompts, regenerate


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL of prompts or messages")
    parser.add_argument("--output", type=Path, required=True, help="JSONL, appended to")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args()
    try:
        _run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for flag in ("max_new_tokens", "batch_size"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1")
    if args.temperature < 0:
        raise ValueError(f"--temperature {args.temperature} must not be negative")
    prompts = read_prompts(args.prompts)
    if not (args.model / "config.json").is_file():
        raise ValueError(f"--model {args.model}: not a Hugging Face model directory")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), use_safetensors=True
    ).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    generation = Generation(args.max_new_tokens, args.batch_size, args.temperature, args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    regenerate(model, tokenizer, prompts, args.output, generation, lambda s: print(s, flush=True))


if __name__ == "__main__":
    sys.exit(main())
