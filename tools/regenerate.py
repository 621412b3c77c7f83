"""The same as ``megatron-eagle regenerate``."""

from megatron_eagle.cli.regenerate import main

if __name__ == "__main__":
    raise SystemExit(main())
