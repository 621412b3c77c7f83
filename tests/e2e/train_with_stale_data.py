"""The example, whose last rank reads an older copy of the training data, ``stale.jsonl``."""

from __future__ import annotations

import os
import sys

from megatron_eagle.cli.train import main

if __name__ == "__main__":
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        sys.argv = [word.replace("answers.jsonl", "stale.jsonl") for word in sys.argv]
    raise SystemExit(main())
