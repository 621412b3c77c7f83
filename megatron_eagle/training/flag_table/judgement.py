"""A judgement: what becomes of a few flags of Megatron's parser in a draft's training."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Verdict(Enum):
    """What becomes of a flag; the value is the word for it in the table."""

    HONOURED = "honoured"
    OF_BASE = "the base's"
    NO_EFFECT = "no effect"
    REFUSED = "refused"


@dataclass(frozen=True)
class Judgement:
    """One verdict over several flags, and why.

    ``unless`` are values with which a refused flag is honoured all the same. A flag that is given
    with its default value changes nothing and is never refused.
    """

    verdict: Verdict
    why: str
    flags: tuple[str, ...]
    unless: tuple[Any, ...] = ()


def honoured(what: str, flags: str) -> Judgement:
    """Judge ``flags`` (separated by spaces) to do what Megatron says; ``what`` is their subject."""
    return Judgement(Verdict.HONOURED, what, tuple(flags.split()))


def of_base(what: str, flags: str) -> Judgement:
    """Judge ``flags`` to describe the base: set from its checkpoint, and refused if they differ."""
    return Judgement(Verdict.OF_BASE, what, tuple(flags.split()))


def no_effect(why: str, flags: str) -> Judgement:
    """Judge ``flags`` to change nothing, so that a recipe may have them; the run says so."""
    return Judgement(Verdict.NO_EFFECT, why, tuple(flags.split()))


def refused(why: str, flags: str, unless: tuple[Any, ...] = ()) -> Judgement:
    """Judge ``flags`` to be refused; ``why`` ends the sentence that starts with the flag."""
    return Judgement(Verdict.REFUSED, why, tuple(flags.split()), unless)
