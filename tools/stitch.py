"""Put a trained module into a copy of its base's files: the same as ``megatron-eagle stitch``.

python tools/stitch.py --hf BASE --module CONVERTED --save DIR
"""

from megatron_eagle.cli.stitch import main

if __name__ == "__main__":
    raise SystemExit(main())
