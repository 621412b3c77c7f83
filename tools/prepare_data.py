"""The same as ``megatron-eagle prepare-data``."""

from megatron_eagle.cli.prepare_data import main

if __name__ == "__main__":
    raise SystemExit(main())
