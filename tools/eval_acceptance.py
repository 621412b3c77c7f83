"""The same as ``megatron-eagle evaluate``."""

from megatron_eagle.cli.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
