"""The answers that an earlier run of a regeneration left, and whether this run may go on from them.

Beside ``answers.jsonl`` lies ``answers.jsonl.settings.json``: what the answers depend on. A run
with another model or setting, or of other prompts under the same ids, is refused, for a file of
answers of two kinds trains a draft for neither.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.atomic import take_back, write_json
from megatron_eagle.data.chat.conversations import Conversation
from megatron_eagle.data.chat.messages import as_record
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import parse_json, read_json_object, reading

Progress = Callable[[str], None]


def settings_file(output: Path) -> Path:
    """Return the name of the settings beside ``output``."""
    return output.with_name(output.name + ".settings.json")


def finished_answers(file: Path, progress: Progress) -> dict[str, dict[str, Any]]:
    """Return the answers in ``file`` by prompt id, after cutting off a torn last line.

    Raises ``UserError`` naming the line that is not an answer.
    """
    with reading("output", file):
        if not file.exists():
            return {}
        lines, newline, torn = file.read_bytes().rpartition(b"\n")
        if torn:
            progress(f"dropping a torn last line of {file}")
            with file.open("r+b") as output:
                output.truncate(len(lines + newline))
        done: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(lines.split(b"\n") if lines else [], start=1):
            where = f"<output> {literal(file)}:{number}"
            record = parse_json(line, where)
            if not isinstance(record, dict) or not isinstance(record.get("id"), str):
                raise UserError(f"{where}: not a line of answers")
            done[record["id"]] = record
        return done


def go_on(
    file: Path,
    done: Mapping[str, Mapping[str, Any]],
    prompts: Mapping[str, Conversation],
    prompt_ids: Mapping[str, Sequence[int]],
    settings: dict[str, Any],
) -> None:
    """Check that the answers ``done`` in ``file`` are what this run would write, and note its
    ``settings`` beside them. ``prompts`` and their token ids go by the same names. Raises
    ``UserError`` naming what differs."""
    beside = settings_file(file)
    take_back(beside)  # the caller has the lock on the answers
    with reading("output", file):
        if done:
            _check_settings(file, beside, settings)
            _check_prompts(file, done, prompts, prompt_ids)
        write_json(beside, settings)


def _check_settings(file: Path, beside: Path, settings: dict[str, Any]) -> None:
    advice = "move it away, or choose another <output>"
    if not beside.is_file():
        raise UserError(
            f"<output> {literal(file)}: holds answers, but {literal(beside.name)}, which says of "
            f"what model, is missing; {advice}"
        )
    before = read_json_object(beside)
    for name in sorted(before.keys() | settings.keys()):
        if before.get(name) != settings.get(name):
            raise UserError(
                f"<output> {literal(file)}: its answers were made with another <{name}> "
                f"({literal(_shown(before.get(name)))}, this run has "
                f"{literal(_shown(settings.get(name)))}); {advice}"
            )


def _check_prompts(
    file: Path,
    done: Mapping[str, Mapping[str, Any]],
    prompts: Mapping[str, Conversation],
    prompt_ids: Mapping[str, Sequence[int]],
) -> None:
    for name, record in done.items():
        if name not in prompts:
            raise UserError(
                f"<output> {literal(file)}: answers prompt {literal(repr(name))}, which <prompts> "
                "does not have; give the prompts that it was made of, or another <output>"
            )
        messages = record.get("messages")
        asked = json.loads(json.dumps([as_record(m) for m in prompts[name].messages]))
        same = isinstance(messages, list) and messages[:-1] == asked
        # Tools and variables of the template show in the ids alone.
        if not same or record.get("prompt_ids") != list(prompt_ids[name]):
            raise UserError(
                f"<output> {literal(file)}: answers another prompt {literal(repr(name))} than "
                "<prompts> has; give the prompts that it was made of, or another <output>"
            )


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)[:16]
