"""Regeneration: the base answers prompts, and its draft is trained to predict these answers.

Any Hugging Face causal model with a chat template can answer, greedily or by sampling, in batches
of prompts of similar length. The output is a JSONL that is only appended to, one line per prompt
id, so a run that was stopped continues.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from megatron_eagle.data.answer_file import finished_answers, go_on
from megatron_eagle.data.chat.conversations import Conversation
from megatron_eagle.data.chat.messages import as_record
from megatron_eagle.data.chat.prompts import PromptTemplate, read_prompt
from megatron_eagle.data.jsonl import read_records
from megatron_eagle.errors import UserError, literal

Progress = Callable[[str], None]
Item = tuple[str, Conversation, list[int]]
"""A prompt: its id, its conversation and its token ids."""
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
    dtype: str = "float32"


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


def regenerate(
    model: Any,
    tokenizer: Any,
    prompts: dict[str, Conversation],
    output: Path,
    generation: Generation,
    progress: Progress = print,
    identity: str | None = None,
) -> int:
    """Answer every prompt that ``output`` has no answer to; return the number of tokens written.

    A line is {"id", "messages" with the answer, "prompt_ids" (of the chat template, with the
    generation prompt), "answer_ids" (with the end token, unless cut at ``max_new_tokens``)}. The
    lines are those of a run that was never stopped: batches are the same, and so is what a batch
    draws. ``identity`` tells the model from others. Raises ``UserError`` for a model without a chat
    template, for a prompt that is too long, and for an ``output`` of another model, of other
    settings or prompts.
    """
    items = _items(tokenizer, prompts, progress)
    _drop_generation_defaults(model, progress)
    _check_lengths(model, items, generation)
    done = finished_answers(output, progress)
    prompt_ids = {name: ids for name, _, ids in items}
    go_on(output, done, prompts, prompt_ids, _settings(generation, items, identity))
    left = len(items) - len(done)
    progress(f"{left} prompts to answer, {len(done)} answered before")
    written, answered, start = 0, 0, time.monotonic()
    with output.open("a", encoding="utf-8") as file:
        for first, batch in _batches(items, generation.batch_size):
            if all(name in done for name, _, _ in batch):
                continue
            torch.manual_seed(generation.seed + first)
            answers = _answer(model, tokenizer, [ids for _, _, ids in batch], generation)
            for (name, prompt, ids), answer in zip(batch, answers, strict=True):
                if name not in done:
                    file.write(_line(tokenizer, name, prompt, ids, answer) + "\n")
                    written, answered = written + len(answer), answered + 1
            file.flush()
            pace = (time.monotonic() - start) / answered
            progress(
                f"{answered}/{left} prompts, {written} tokens, "
                f"{written / (time.monotonic() - start):.0f} tokens/s, "
                f"{pace * (left - answered) / 60:.1f} min left"
            )
    return written


def _items(tokenizer: Any, prompts: dict[str, Conversation], progress: Progress) -> list[Item]:
    """Return the prompts with their token ids, the shortest first."""
    template = PromptTemplate(tokenizer)
    if not template.is_there:
        raise UserError("<model>: its tokenizer has no chat template")
    items = [
        (name, prompt, template.ids(prompt, f"prompt {literal(repr(name))}"))
        for name, prompt in prompts.items()
    ]
    for note in template.notes():
        progress(f"note: {note}")
    return sorted(items, key=lambda item: len(item[2]))


def _settings(generation: Generation, items: list[Item], identity: str | None) -> dict[str, Any]:
    """Return what the answers depend on, by the names of the parameters."""
    settings = {
        "model": identity,
        "max_new_tokens": generation.max_new_tokens,
        "temperature": generation.temperature,
        "dtype": generation.dtype,
    }
    if generation.temperature == 0:
        return settings
    # What a batch draws depends on who is in it.
    prompts = hashlib.sha256(json.dumps([(name, ids) for name, _, ids in items]).encode())
    return {
        **settings,
        "seed": generation.seed,
        "batch_size": generation.batch_size,
        "prompts": prompts.hexdigest(),
    }


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


def _check_lengths(model: Any, todo: list[Item], generation: Generation) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, _, ids in todo:
        if limit is not None and len(ids) + generation.max_new_tokens > limit:
            raise UserError(
                f"prompt {name!r}: {len(ids)} tokens and <max_new_tokens> "
                f"{generation.max_new_tokens} exceed the model's {limit} positions"
            )


def _batches(items: list[Item], size: int) -> Iterator[tuple[int, list[Item]]]:
    """Yield the number of the first item and the items of every batch."""
    for start in range(0, len(items), size):
        yield start, items[start : start + size]


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
