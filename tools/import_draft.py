"""The same as ``megatron-eagle import-draft``."""

from megatron_eagle.cli.import_draft import main

if __name__ == "__main__":
    raise SystemExit(main())
