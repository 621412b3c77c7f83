"""Export a trained draft for an inference server: the same as ``megatron-eagle convert``.

python tools/convert_to_hf.py --load CKPT --output DIR [--format sglang] [--eval figures.json]
"""

from megatron_eagle.cli.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
