"""Convert a Hugging Face model to a base: the same as ``megatron-eagle import-base``.

python tools/import_base.py --hf DIR --save CKPT
"""

from megatron_eagle.cli.import_base import main

if __name__ == "__main__":
    raise SystemExit(main())
