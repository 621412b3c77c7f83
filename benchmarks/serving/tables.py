"""The tables of `make serve`, and a line for everything that should be equal and is not."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.serving.measure import Load


def table(
    plain: dict[int, Load], drafted: dict[int, Load], ours: dict[str, Any], whole: bool
) -> tuple[str, list[str]]:
    """Return the Markdown tables, and a line for everything that should be equal and is not.

    ``whole``: the server got all the prompts that ``ours`` is about, so that they compare.
    """
    rows = [["", "without draft", "with draft", "ratio"], ["---"] * 4]
    wrong = []
    for number, without in plain.items():
        speed_rows, differing = _speeds(number, without, drafted[number])
        rows += speed_rows
        wrong += differing
        for name, way in (("without", without), ("with", drafted[number])):
            if way.unlike_first:
                wrong.append(f"{number} at a time {name} the draft, repetitions differ")
    rows += [[], ["", "server", "ours, same rule", "ours"], ["---"] * 4]
    for number, with_draft in drafted.items():
        count_rows, equal = _counts(number, with_draft.counts, ours)
        rows += count_rows if whole else [[*row[:2], "", ""] for row in count_rows]
        if whole and not equal:
            wrong.append(f"{number} at a time, the server counts otherwise than we do")
    return "\n".join(f"| {' | '.join(row)} |" if row else "" for row in rows), wrong


def _speeds(number: int, without: Load, with_draft: Load) -> tuple[list[list[str]], list[str]]:
    """Return the rows on speed and answers of ``number`` requests at a time, and differences."""
    at = "one prompt at a time" if number == 1 else f"{number} at a time"
    rates = [x.tokens_per_second for x in (without, with_draft)]
    cpu = [statistics.median(x.cpu_seconds) for x in (without, with_draft)]
    pairs = list(zip(without.answers, with_draft.answers, strict=True))
    equal = sum(a == b for a, b in pairs)
    rows = [
        [f"{at}: {name}", *(f"{x:.1f}" for x in values), f"{values[1] / max(values[0], 1e-9):.2f}"]
        for name, values in (("tokens/s", rates), ("CPU seconds", cpu))
    ]
    rows.append([f"{at}: equal answers", "", f"{equal} of {len(pairs)}", ""])
    different = len(pairs) - equal
    return rows, [f"{at}, {different} of {len(pairs)} answers differ with the draft"][:different]


def _counts(
    number: int, counts: dict[str, int], ours: dict[str, Any]
) -> tuple[list[list[str]], bool]:
    """Return the rows on what the server counted, and whether it is what we count."""
    verifications = counts["verifications"]
    accepted = [counts[f"accepted_{i}"] for i in range(len(counts) - 1)]
    length = 1 + sum(accepted) / max(1, verifications)
    expected = (ours["verifications"], ours["server_accepted"])
    rows = [
        [
            f"accepted length, {number} at a time", f"{length:.4f}",
            f"{ours['server_accepted_length']:.4f}", f"{ours['accepted_length']:.4f}",
        ],
        [
            "verifications; accepted per position", f"{verifications}; {_words(accepted)}",
            f"{expected[0]}; {_words(expected[1])}", f"{expected[0]}; {_words(ours['accepted'])}",
        ],
    ]  # fmt: skip
    return rows, (verifications, accepted) == expected


def _words(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
