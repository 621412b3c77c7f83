"""Training answers of random ids."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.helpers.tiny_hf import SIZES


def write_answers(file: Path, lines: int = 40) -> None:
    """Write ``lines`` random prompts and answers of ragged lengths to ``file``."""
    rng = random.Random(3)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(SIZES["vocab_size"]) for _ in range(rng.randint(low, high))]

    records = [{"prompt_ids": ids(3, 9), "answer_ids": ids(6, 25)} for _ in range(lines)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
