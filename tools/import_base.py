"""The same as ``megatron-eagle import-base``."""

from megatron_eagle.cli.import_base import main

if __name__ == "__main__":
    raise SystemExit(main())
