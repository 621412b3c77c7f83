"""FLOP of training a draft of the quality study on an answer, by arithmetic.

Counted are products, attention's included, of the draft, its head and the teacher. The base's
forward is not: it is the same for all drafts and is needed once per answer, however many drafts
learn from it (``base_flop``). A product with a trained weight is two more in backward, one with a
frozen weight one more. Softmaxes, norms, the optimizer and the few keys of a row's own branch are
left out.

H hidden size, F width of the MLP, q and k channels of all query and of all key/value heads, V and D
ids of the base and the draft, A aux layers, K steps or judged slots, B rows of a block, r rank of a
Markov head.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TRAINED, FROZEN, FORWARD = 6, 4, 2
"""FLOP per weight and row: with both gradients, with the input's alone, without any."""
ATTENTION = 7 * 2
"""FLOP per channel, query and key: two products forward, five backward."""
MARKOV_RANK = 256


@dataclass(frozen=True)
class Sizes:
    """Sizes of the base, most of which a draft shares."""

    hidden: int
    ffn: int
    queries: int
    keys: int
    vocab: int
    layers: int

    @classmethod
    def of(cls, base: Path) -> Sizes:
        """Read the description beside the checkpoint ``base``."""
        args = json.loads((base / "eagle_base.json").read_text())["megatron_args"]
        return cls(
            hidden=args["hidden_size"],
            ffn=args["ffn_hidden_size"],
            queries=args["num_attention_heads"] * args["kv_channels"],
            keys=args["num_query_groups"] * args["kv_channels"],
            vocab=args["vocab_size"],
            layers=args["num_layers"],
        )

    def key_value_weights(self, width: int) -> int:
        """Return the weights that make keys and values of rows of ``width`` channels."""
        return 2 * width * self.keys

    def other_weights(self, width: int) -> int:
        """Return the other weights of a layer, whose attention reads ``width`` channels."""
        return width * self.queries + self.queries * self.hidden + 3 * self.hidden * self.ffn


@dataclass(frozen=True)
class Draft:
    """What of a draft's flags decides its FLOP. ``block``: None for a draft that is unrolled."""

    layers: int
    steps: int
    block: int | None
    vocab: int | None
    aux_layers: int
    is_mtp: bool
    markov: int

    @classmethod
    def of(cls, flags: Mapping[str, str]) -> Draft:
        """Read the flags of a variant; raise ``ValueError`` for one that this count lacks."""
        algorithm = flags.get("--eagle-algorithm", "eagle3")
        if algorithm not in ("eagle3", "dflash", "dspark", "mtp") or "--eagle-anchors" in flags:
            raise ValueError(f"no count of FLOP for {dict(flags)}")
        block = flags.get("--eagle-block-size")
        steps = int(flags.get("--eagle-ttt-steps", 3))
        if block is not None:
            steps = int(block) if algorithm == "dspark" else int(block) - 1
        vocab = flags.get("--eagle-draft-vocab-size")
        return cls(
            layers=int(flags.get("--eagle-num-layers", 1)),
            steps=steps,
            block=None if block is None else int(block),
            vocab=None if vocab is None else int(vocab),
            aux_layers=len(flags.get("--eagle-aux-layers", "0 0 0").split()),
            is_mtp=algorithm == "mtp",
            markov=MARKOV_RANK if algorithm == "dspark" else 0,
        )


@dataclass(frozen=True)
class Rows:
    """How much of everything a training step has for one answer.

    tokens: rows of the trunk, or of a block draft's context. run: rows of a whole pass of the
    layers, which later rows do not read. judged: by the loss, all steps or slots together. targets:
    that the teacher evaluates. pairs: of a query and a key of the trunk or context, and of the
    block, in one pass.
    """

    tokens: int
    run: int
    judged: int
    targets: int
    pairs: int

    @classmethod
    def of(cls, draft: Draft, prompt: int, answer: int) -> Rows:
        """Count for a prompt and an answer of so many tokens, the whole answer supervised."""
        end = prompt + answer
        if draft.block is None:
            run = range(max(0, prompt - draft.steps), end - 1)
            late = (max(0, step + 1 - prompt) for step in range(draft.steps))
            judged = sum(max(0, answer - missing) for missing in late)
            return cls(end, len(run), judged, answer, sum(row + 1 for row in run))
        anchors = range(prompt, end - 1)
        judged = sum(min(draft.steps, end - 1 - anchor) for anchor in anchors)
        pairs = sum(draft.block * (anchor + draft.block) for anchor in anchors)
        return cls(end - 1, draft.block * len(anchors), judged, len(anchors), pairs)


def step_flop(sizes: Sizes, draft: Draft, rows: Rows) -> dict[str, float]:
    """Return the FLOP of one answer's training step by part."""
    hidden, vocab = sizes.hidden, draft.vocab or sizes.vocab
    parts = _block_layers(sizes, draft, rows) if draft.block else _unroll(sizes, draft, rows)
    head = FROZEN if draft.block or draft.is_mtp else TRAINED
    return {
        **parts,
        "head": rows.judged * vocab * (head * hidden + TRAINED * draft.markov),
        "teacher": FORWARD * rows.targets * sizes.vocab * hidden,
    }


def _unroll(sizes: Sizes, draft: Draft, rows: Rows) -> dict[str, float]:
    """Count K passes: the first runs all rows up to the last layer's keys and values."""
    hidden, later = sizes.hidden, draft.steps - 1
    widths = [hidden if draft.is_mtp else 2 * hidden, *[hidden] * (draft.layers - 1)]
    trunk = [sizes.key_value_weights(width) for width in widths]
    others = [sizes.other_weights(width) for width in widths]
    products = rows.tokens * (sum(trunk) + sum(others[:-1]))
    products += rows.run * (others[-1] + later * (sum(trunk) + sum(others)))
    whole = rows.tokens * (rows.tokens + 1) // 2
    pairs = rows.pairs * (1 + later * draft.layers) + whole * (draft.layers - 1)
    if draft.is_mtp:
        fc = TRAINED * 2 * hidden**2 * (rows.tokens + later * rows.run)
    else:
        fc = FROZEN * draft.aux_layers * hidden**2 * rows.tokens  # features need no gradient
    return {
        "fc": fc,
        "layers": TRAINED * products,
        "attention": ATTENTION * sizes.queries * pairs,
    }


def _block_layers(sizes: Sizes, draft: Draft, rows: Rows) -> dict[str, float]:
    """Count the one pass of all blocks, and the keys and values of the context in every layer."""
    hidden = sizes.hidden
    keys_values = sizes.key_value_weights(hidden)
    products = rows.run * (keys_values + sizes.other_weights(hidden)) + rows.tokens * keys_values
    return {
        "fc": FROZEN * draft.aux_layers * hidden**2 * rows.tokens,
        "layers": TRAINED * draft.layers * products,
        "attention": ATTENTION * sizes.queries * rows.pairs * draft.layers,
    }


def base_flop(sizes: Sizes, tokens: int) -> float:
    """Return the FLOP of the base's forward up to its final hidden states."""
    layer = sizes.key_value_weights(sizes.hidden) + sizes.other_weights(sizes.hidden)
    attention = 2 * 2 * sizes.queries * tokens * (tokens + 1) // 2
    return sizes.layers * (FORWARD * layer * tokens + attention)


class Answers:
    """The prompts and answers of a data file, by length, cut to ``seq_length`` tokens."""

    def __init__(self, lengths: Iterable[tuple[int, int]], seq_length: int) -> None:
        cut = [(prompt, min(answer, seq_length - prompt)) for prompt, answer in lengths]
        self.lengths = [(prompt, answer) for prompt, answer in cut if answer > 0]

    @classmethod
    def read(cls, file: Path, seq_length: int) -> Answers:
        """Read a JSONL of ``prompt_ids`` and ``answer_ids``."""
        lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
        return cls(((len(x["prompt_ids"]), len(x["answer_ids"])) for x in lines), seq_length)

    def mean_flop(self, sizes: Sizes, flags: Mapping[str, str]) -> float:
        """Return the mean FLOP of training a variant on one answer."""
        draft = Draft.of(flags)
        total = sum(
            sum(step_flop(sizes, draft, Rows.of(draft, *length)).values())
            for length in self.lengths
        )
        return total / len(self.lengths)

    def mean_base_flop(self, sizes: Sizes) -> float:
        """Return the mean FLOP of the base's forward on one answer."""
        return sum(base_flop(sizes, sum(length)) for length in self.lengths) / len(self.lengths)


def matched_iterations(iterations: int, reference: float, own: float) -> int:
    """Return in how many answers of ``own`` FLOP a training does the work of ``iterations`` answers
    of ``reference`` FLOP."""
    return max(1, round(iterations * reference / own))
