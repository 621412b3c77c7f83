"""Tokenize chats or texts for training: the same as ``megatron-eagle prepare-data``.

python tools/prepare_data.py --input chats.jsonl --tokenizer HF_DIR --output-prefix data/chats
"""

from megatron_eagle.cli.prepare_data import main

if __name__ == "__main__":
    raise SystemExit(main())
