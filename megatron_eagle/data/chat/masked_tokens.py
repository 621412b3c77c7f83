"""Conversion of a rendered conversation to token ids and the mask of what the model generated.

Shapes: n tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_eagle.data.chat.template import RenderedSample, Span
from megatron_eagle.data.chat.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Document:
    """Token ids [n] int64 and mask [n] bool (True: the token is supervised)."""

    ids: np.ndarray
    mask: np.ndarray


def mask_tokens(sample: RenderedSample, tokenizer: TextTokenizer) -> Document:
    """Tokenize ``sample.text`` and supervise the tokens inside its spans.

    Where a span begins or ends inside a token (a merge across the boundary), the text is tokenized
    in two parts there, as a server does that tokenizes the prompt alone. Where that would change
    the text (SentencePiece's word starts), the token is kept and not supervised.

    A span that the template did not mark itself ends with the end-of-turn token: the last special
    token in it, provided only whitespace follows. The model writes nothing after it, so the mask
    ends there. If a template ends a turn without a special token, the whole span is supervised.
    """
    ids, starts, ends = _encode(sample, tokenizer)
    mask = np.zeros(len(ids), dtype=bool)
    special = np.isin(ids, list(tokenizer.special_ids))
    for first, last in sample.spans:
        inside = (starts >= first) & (ends <= last) & (ends > first)
        if not sample.marked:
            turn_ends = np.flatnonzero(inside & special)
            if turn_ends.size and not sample.text[ends[turn_ends[-1]] : last].strip():
                inside[turn_ends[-1] + 1 :] = False
        mask |= inside
    return Document(ids, mask)


def _encode(
    sample: RenderedSample, tokenizer: TextTokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    uncut = _with_edges(*tokenizer.encode(sample.text), 0)
    cuts = _inside_a_token(sample.spans, uncut[1], len(sample.text))
    if not cuts:
        return uncut
    edges = [0, *cuts, len(sample.text)]
    parts = [_with_edges(*tokenizer.encode(sample.text[a:b]), a) for a, b in pairwise(edges)]
    split = tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))
    same = tokenizer.decode(split[0].tolist()) == tokenizer.decode(uncut[0].tolist())
    return (split[0], split[1], split[2]) if same else uncut


def _with_edges(
    ids: list[int], offsets: list[tuple[int, int]], shift: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (ids, starts, ends), where every character of the text belongs to a token.

    A token also gets the characters before it that no token covers: byte-level tokenizers leave a
    word's space out of its offsets. A token without characters (the first bytes of a character, the
    start of a word) gets the end of the next one.
    """
    if not ids:
        empty = np.empty(0, dtype=np.int64)
        return empty, empty, empty
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(spans[:, 1])
    for i in np.flatnonzero(spans[:, 0] == spans[:, 1])[::-1]:
        ends[i] = ends[min(i + 1, len(ends) - 1)]
    starts = np.minimum(spans[:, 0], np.concatenate([[0], ends[:-1]]))
    return np.asarray(ids, dtype=np.int64), starts + shift, ends + shift


def _inside_a_token(spans: Iterable[Span], starts: np.ndarray, length: int) -> list[int]:
    """Return the edges of ``spans`` at which no token starts, in ascending order."""
    edges = {edge for span in spans for edge in span}
    return sorted(edges - set(starts.tolist()) - {0, length})
