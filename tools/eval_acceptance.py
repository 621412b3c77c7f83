"""Measure accepted length by decoding: the same as ``megatron-eagle eval``.

python tools/eval_acceptance.py --base BASE --draft DRAFT --prompts prompts.jsonl
torchrun --nproc-per-node 8 tools/eval_acceptance.py ...     (the same, tensor-parallel)
"""

from megatron_eagle.cli.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
