"""Write a model's answers to prompts: the same as ``megatron-eagle regenerate``.

python tools/regenerate.py --model HF_DIR --prompts prompts.jsonl --output answers.jsonl
"""

from megatron_eagle.cli.regenerate import main

if __name__ == "__main__":
    raise SystemExit(main())
