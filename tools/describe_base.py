"""Say what a checkpoint of Megatron's is as a base: the same as ``megatron-eagle describe-base``.

python tools/describe_base.py CKPT --write FILE
"""

from megatron_eagle.cli.describe_base import main

if __name__ == "__main__":
    raise SystemExit(main())
