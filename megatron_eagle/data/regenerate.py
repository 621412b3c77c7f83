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
from transformers import GenerationConfig

from megatron_eagle.data.chat.conversations import Conversation
from megatron_eagle.data.chat.messages import as_record
from megatron_eagle.data.chat.prompts import PromptTemplate, read_prompt
from megatron_eagle.data.jsonl import read_records
from megatron_eagle.errors import UserError, literal

Progress = Callable[[str], None]
_SAMPLING = (
    "do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty",
    "no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
    "min_new_tokens", "num_beams", "guidance_scale",
)  # fmt: skip
"""Settings of a generation_config.json that change which tokens are written."""


@dataclass(frozen=True)
class Generation:
    """Settings of the generation; ``temperature`` 0 is greedy."""

    max_new_tokens: int = 128
    batch_size: int = 64
    temperature: float = 0.0
    seed: int = 0


def read_prompts(file: Path) -> dict[str, Conversation]:
    """Read a JSONL of conversations to be answered or of a user's ``prompt``; return them by id.

    Ids default to line numbers. Raises ``UserError`` naming file and line of a bad one.
    """
    prompts: dict[str, Conversation] = {}
    for where, record in read_records(file, "prompts"):
        prompt = read_prompt(record, where)
        given = record.get("id")
        name = where.rpartition(":")[2] if given is None else str(given)
        if name in prompts:
            raise UserError(f"{where}: the id {literal(repr(name))} occurs twice")
        prompts[name] = prompt
    if not prompts:
        raise UserError(f"<prompts> {file}: no prompts in it")
    return prompts


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
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"<output> {file}:{number}: not a line of answers") from None
    return done


def regenerate(
    model: Any,
    tokenizer: Any,
    prompts: dict[str, Conversation],
    output: Path,
    generation: Generation,
    progress: Progress = print,
) -> int:
    """Answer every prompt that ``output`` has no answer to; return the number of tokens written.

    A line is {"id", "messages" with the answer, "prompt_ids" (of the chat template, with the
    generation prompt), "answer_ids" (with the end token, unless cut at ``max_new_tokens``)}. Raises
    ``UserError`` for a model without a chat template and for a prompt that is too long.
    """
    template = PromptTemplate(tokenizer)
    if not template.is_there:
        raise UserError("<model>: its tokenizer has no chat template")
    done = finished_ids(output, progress)
    todo = [
        (name, prompt, template.ids(prompt, f"prompt {literal(repr(name))}"))
        for name, prompt in prompts.items()
        if name not in done
    ]
    _drop_generation_defaults(model, progress)
    _check_lengths(model, todo, generation)
    todo.sort(key=lambda item: len(item[2]))
    progress(f"{len(todo)} prompts to answer, {len(done)} answered before")
    written, answered, start = 0, 0, time.monotonic()
    with output.open("a", encoding="utf-8") as file:
        for batch in _batches(todo, generation.batch_size):
            torch.manual_seed(generation.seed + len(done) + answered)
            answers = _answer(model, tokenizer, [ids for _, _, ids in batch], generation)
            for (name, prompt, ids), answer in zip(batch, answers, strict=True):
                file.write(_line(tokenizer, name, prompt, ids, answer) + "\n")
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


def _drop_generation_defaults(model: Any, progress: Progress) -> None:
    """Leave only the end tokens of the model's generation_config.json, and say what else it held.

    A repetition penalty or top-p there would make answers that the base does not give by itself.
    """
    config = model.generation_config
    ends = [getattr(config, "eos_token_id", None), getattr(model.config, "eos_token_id", None)]
    united = {token for ids in ends for token in (ids if isinstance(ids, list) else [ids])}
    settings = config.to_diff_dict() if isinstance(config, GenerationConfig) else {}
    ignored = [f"{name} {settings[name]}" for name in _SAMPLING if name in settings]
    if ignored:
        progress(f"of generation_config.json only end tokens are used, not {', '.join(ignored)}")
    model.generation_config = GenerationConfig(eos_token_id=sorted(united - {None}) or None)


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
    ends = set(model.generation_config.eos_token_id or [])
    return [_until_end(answer, ends) for answer in new]


def _until_end(answer: list[int], ends: set[int]) -> list[int]:
    stop = next((i for i, token in enumerate(answer) if token in ends), len(answer) - 1)
    return answer[: stop + 1]


def _line(
    tokenizer: Any, name: str, prompt: Conversation, prompt_ids: list[int], answer: list[int]
) -> str:
    text = tokenizer.decode(answer, skip_special_tokens=True)
    record = {
        "id": name,
        "messages": [*map(as_record, prompt.messages), {"role": "assistant", "content": text}],
        **({"tools": prompt.tools} if prompt.tools else {}),
        "prompt_ids": prompt_ids,
        "answer_ids": answer,
    }
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))
