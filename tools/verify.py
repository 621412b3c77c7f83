"""Check files for damage: the same as ``megatron-eagle verify``.

python tools/verify.py PATH [PATH ...]
"""

from megatron_eagle.cli.verify import main

if __name__ == "__main__":
    raise SystemExit(main())
