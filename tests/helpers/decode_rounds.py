"""Speculative decoding round by round: what was drafted in each, beside what an oracle drafts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def run_rounds(
    kind: type,
    draft: Any,
    cached: Any,
    prompts: list[list[int]],
    new_tokens: int,
    steps: int,
    truth: list[list[int]],
) -> dict[str, Any]:
    """Answer the prompts with proposers of class `kind`: the answers, the drafts of every round,
    and how many were accepted. In every second round the first draft is replaced by the true token,
    so that some are."""
    from megatron_eagle.decode.interleave import interleave
    from megatron_eagle.decode.speculative import ChainCounts, speculative_steps

    rounds: list[list[list[int]]] = []

    class Spy(kind):  # type: ignore[misc]
        def propose(self, verified: Any) -> Tensor:
            drafts: Tensor = super().propose(verified)
            rounds.append(drafts.tolist())
            known = (verified.start + verified.last + 1).tolist()
            if len(rounds) % 2 == 0:
                for row, (length, prompt) in enumerate(zip(known, prompts, strict=True)):
                    answer = truth[row]
                    drafts[row, 0] = answer[min(length - len(prompt) + 1, len(answer) - 1)]
            return drafts

        def keep(self, sequences: Tensor) -> None:
            raise AssertionError("all prompts end together")

    def proposer(capacity: int) -> Spy:
        return Spy(draft, cached, steps, capacity)

    counts = ChainCounts(steps)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("megatron_eagle.decode.sequences.COMPACT_BELOW", -1.0)
        (answers,) = interleave(
            [speculative_steps(cached, proposer, prompts, new_tokens, steps, counts)]
        )
    return {"answers": answers, "rounds": rounds, "accepted": counts.accepted}


def check_rounds(
    name: str,
    rounds: Any,
    prompts: list[list[int]],
    new_tokens: int,
    truth: list[list[int]],
    drafted: Callable[[Tensor], list[int]],
) -> None:
    """Follow each sequence through the rounds of :func:`run_rounds`, and compare what was drafted
    in each with what the oracle has `drafted` behind the same tokens."""
    for row, prompt in enumerate(prompts):
        written = 1  # of the answer, after the prefill
        for number, drafts in enumerate(rounds, start=1):
            if written >= new_tokens:
                break
            expected = drafted(torch.tensor([*prompt, *truth[row][:written]]))
            assert drafts[row] == expected, (name, row, number)
            tried = list(expected)
            if number % 2 == 0:
                tried[0] = truth[row][min(written, len(truth[row]) - 1)]
            rest = truth[row][written:]
            hits = 0
            while hits < min(len(tried), len(rest)) and tried[hits] == rest[hits]:
                hits += 1
            written += hits + 1
