"""Convert a Hugging Face draft: the same as ``megatron-eagle import-draft``.

python tools/import_draft.py --hf DIR --base BASE --save CKPT
"""

from megatron_eagle.cli.import_draft import main

if __name__ == "__main__":
    raise SystemExit(main())
