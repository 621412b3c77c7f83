"""Regeneration: the base answers prompts, and its draft is trained to predict these answers.

Any Hugging Face causal model with a chat template can answer, greedily or by sampling, in batches
of prompts of similar length. The output is a JSONL that is only appended to, one line per prompt
id, so a run that was stopped continues.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.data.jsonl import read_records
from megatron_eagle.errors import UserError

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Generation:
    """Settings of the generation; ``temperature`` 0 is greedy."""

    max_new_tokens: int = 128
    batch_size: int = 64
    temperature: float = 0.0
    seed: int = 0


def read_prompts(file: Path) -> dict[str, list[dict[str, str]]]:
    """Read a JSONL of {"id", "messages"} or {"id", "prompt"}; return messages by prompt id.

    Ids default to line numbers. Raises ``UserError`` naming file and line of a bad one.
    """
    prompts: dict[str, list[dict[str, str]]] = {}
    for where, record in read_records(file, "prompts"):
        messages = _messages(record, where)
        name = str(record.get("id", where.rpartition(":")[2]))
        if name in prompts:
            raise UserError(f"{where}: the id {name!r} occurs twice")
        prompts[name] = messages
    if not prompts:
        raise UserError(f"<prompts> {file}: no prompts in it")
    return prompts


def _messages(record: dict[str, Any], where: str) -> list[dict[str, str]]:
    if isinstance(record.get("prompt"), str) and record["prompt"].strip():
        return [{"role": "user", "content": record["prompt"]}]
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: neither a 'prompt' text nor a list of 'messages'")
    if not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages):
        raise UserError(f"{where}: a message needs 'role' and 'content'")
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]  # the answer to regenerate
    if not messages:
        raise UserError(f"{where}: nothing to answer in it")
    return messages


def finished_ids(file: Path, progress: Progress) -> set[str]:
    """Return the prompt ids that ``file`` has answers to, after cutting off a torn last line.

    Raises ``UserError`` naming the line that is not an answer.
    """
    if not file.exists():
        return set()
    lines, newline, torn = file.read_bytes().rpartition(b"\n")
    if torn:
        progress(f"dropping a torn last line of {file}")
        with file.open("r+b") as output:
            output.truncate(len(lines + newline))
    done = set()
    for number, line in enumerate(lines.splitlines(), start=1):
        try:
            done.add(json.loads(line)["id"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"<output> {file}:{number}: not a line of answers") from None
    return done


def regenerate(
    model: Any,
    tokenizer: Any,
    prompts: dict[str, list[dict[str, str]]],
    output: Path,
    generation: Generation,
    progress: Progress = print,
) -> int:
    """Answer every prompt that ``output`` has no answer to; return the number of tokens written.

    A line is {"id", "messages" with the answer, "prompt_ids" (of the chat template, with the
    generation prompt), "answer_ids" (with the end token, unless cut at ``max_new_tokens``)}. Raises
    ``UserError`` for a model without a chat template and for a prompt that is too long.
    """
    if tokenizer.chat_template is None:
        raise UserError("<model>: its tokenizer has no chat template")
    done = finished_ids(output, progress)
    todo = [
        (name, messages, prompt_ids(tokenizer, messages))
        for name, messages in prompts.items()
        if name not in done
    ]
    _check_lengths(model, todo, generation)
    todo.sort(key=lambda item: len(item[2]))
    progress(f"{len(todo)} prompts to answer, {len(done)} answered before")
    written, answered, start = 0, 0, time.monotonic()
    with output.open("a", encoding="utf-8") as file:
        for batch in _batches(todo, generation.batch_size):
            torch.manual_seed(generation.seed + len(done) + answered)
            answers = _answer(model, tokenizer, [ids for _, _, ids in batch], generation)
            for (name, messages, ids), answer in zip(batch, answers, strict=True):
                file.write(_line(tokenizer, name, messages, ids, answer) + "\n")
                written += len(answer)
            file.flush()
            answered += len(batch)
            pace = (time.monotonic() - start) / answered
            progress(
                f"{answered}/{len(todo)} prompts, {written} tokens, "
                f"{written / (time.monotonic() - start):.0f} tokens/s, "
                f"{pace * (len(todo) - answered) / 60:.1f} min left"
            )
    return written


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Return the ids of the rendered conversation, the generation prompt included."""
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(encoded, add_special_tokens=False)["input_ids"]


def _check_lengths(
    model: Any, todo: list[tuple[str, Any, list[int]]], generation: Generation
) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, _, ids in todo:
        if limit is not None and len(ids) + generation.max_new_tokens > limit:
            raise UserError(
                f"prompt {name!r}: {len(ids)} tokens and <max_new_tokens> "
                f"{generation.max_new_tokens} exceed the model's {limit} positions"
            )


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@torch.no_grad()
def _answer(
    model: Any, tokenizer: Any, prompts: list[list[int]], generation: Generation
) -> list[list[int]]:
    """Generate one answer per prompt, each up to and including its end token."""
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id or 0  # masked, so any id will do
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    sampling: dict[str, Any] = {"do_sample": False}
    if generation.temperature > 0:
        sampling = {"do_sample": True, "temperature": generation.temperature, "top_k": 0}
    new = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=generation.max_new_tokens,
        pad_token_id=pad,
        **sampling,
    )[:, width:].tolist()
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    return [_until_end(answer, ends) for answer in new]


def _until_end(answer: list[int], ends: set[int]) -> list[int]:
    stop = next((i for i, token in enumerate(answer) if token in ends), len(answer) - 1)
    return answer[: stop + 1]


def _line(
    tokenizer: Any, name: str, messages: list[dict[str, str]], prompt: list[int], answer: list[int]
) -> str:
    text = tokenizer.decode(answer, skip_special_tokens=True)
    record = {
        "id": name,
        "messages": [*messages, {"role": "assistant", "content": text}],
        "prompt_ids": prompt,
        "answer_ids": answer,
    }
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))
