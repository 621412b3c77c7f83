"""The same as ``megatron-eagle extract-features``."""

from megatron_eagle.cli.extract_features import main

if __name__ == "__main__":
    raise SystemExit(main())
