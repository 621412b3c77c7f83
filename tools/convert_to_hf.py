"""The same as ``megatron-eagle convert``."""

from megatron_eagle.cli.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
