"""Describe a base that Megatron saved, from the arguments and tensor names in its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.directory import BaseInfo, parse_base
from megatron_eagle.checkpoint.hybrid_pattern import megatron_layers, pattern_of
from megatron_eagle.checkpoint.layer_blocks import layers_with_weights
from megatron_eagle.checkpoint.native.architecture import architecture_args, current_names
from megatron_eagle.checkpoint.native.arguments import SavedArguments, read_arguments
from megatron_eagle.checkpoint.native.fingerprint import fingerprint
from megatron_eagle.checkpoint.native.hybrid import norms_heads
from megatron_eagle.checkpoint.native.positions import rope_description, rope_of_config
from megatron_eagle.checkpoint.native.values import required, size
from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.errors import UserError, literal

FAMILY, HYBRID_FAMILY = "megatron-gpt", "megatron-hybrid"
"""Families of bases in whose checkpoint all conventions are Megatron's own."""
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
POSITIONS = "embedding.position_embeddings.weight"
_NUMBERED = re.compile(r"decoder\.layers\.(\d+)\.")


def describe_checkpoint(directory: str | Path) -> BaseInfo:
    """Describe the base in ``directory``: a save directory of Megatron's or one iteration of it.

    Raises ``UserError`` naming the file for a checkpoint that says too little, of something else
    than a GPT, or whose arguments and tensors contradict each other.
    """
    checkpoint = CheckpointReader.open(directory)
    saved = read_arguments(checkpoint.directory)
    args = current_names(saved.args)
    _check_kind(checkpoint)
    architecture = architecture_args(args, saved.source)
    hybrid = pattern_of(architecture) is not None
    if hybrid:
        architecture["qk_layernorm"] = norms_heads(checkpoint.keys())
    vocab_size = _vocabulary(args, checkpoint, saved.source)
    architecture |= {
        "vocab_size": vocab_size,
        "make_vocab_size_divisible_by": args.get("make_vocab_size_divisible_by") or 128,
    }
    _check_tensors(architecture, checkpoint, saved.source)
    rope = rope_description(args, saved.source)
    base = BaseInfo(
        family=HYBRID_FAMILY if hybrid else FAMILY,
        name=_name(Path(directory), checkpoint.directory),
        fingerprint=fingerprint(checkpoint),
        vocab_size=vocab_size,
        hf_config=_config(architecture, rope, args.get("mscale", 1.0)),
        megatron_args=architecture,
        rope=rope,
        source=_origin(saved, checkpoint.directory),
        tokenizer=_tokenizer(args),
    )
    return parse_base(base.as_dict(), saved.source)


def _name(given: Path, iteration: Path) -> str:
    root = given.resolve()
    return root.parent.name if root == iteration.resolve() else root.name


def _origin(saved: SavedArguments, iteration: Path) -> str:
    when = iteration.name if saved.iteration in (None, 0) else f"iteration {saved.iteration}"
    return f"{saved.trainer} checkpoint, {when}"


def _tokenizer(args: Mapping[str, Any]) -> dict[str, str]:
    names = ("tokenizer_type", "tokenizer_model")
    return {name: args[name] for name in names if isinstance(args.get(name), str)}


def _config(args: Mapping[str, Any], rope: Mapping[str, Any], mscale: float) -> dict[str, Any]:
    """Return the fields of a config.json that the arguments know."""
    return {
        "vocab_size": args["vocab_size"],
        "hidden_size": args["hidden_size"],
        "num_hidden_layers": args["num_layers"],
        "max_position_embeddings": args["max_position_embeddings"],
        **rope_of_config(args, rope, mscale),
    }


def _check_kind(checkpoint: CheckpointReader) -> None:
    keys = checkpoint.keys()
    if any(key.startswith(("encoder.", "model.encoder.", "lm_head.")) for key in keys):
        raise UserError(f"{literal(checkpoint.directory)}: holds an encoder (T5, BERT), no GPT")
    if EMBEDDING not in keys or not any(key.startswith("decoder.layers.") for key in keys):
        raise UserError(f"{literal(checkpoint.directory)}: holds no GPT ({EMBEDDING} is missing)")


def _vocabulary(args: Mapping[str, Any], checkpoint: CheckpointReader, source: str) -> int:
    """Return the number of token ids: the unpadded one if it is known, else all rows."""
    rows = checkpoint.shape(EMBEDDING)[0]
    padded = args.get("padded_vocab_size")
    if padded not in (None, rows):
        raise UserError(
            f"{source}: padded_vocab_size {literal(padded)}, but {EMBEDDING} has {rows} rows"
        )
    if args.get("vocab_size") is None:
        return rows
    known = size(args, "vocab_size", source)
    if known > rows:
        raise UserError(f"{source}: vocab_size {known}, but {EMBEDDING} has {rows} rows")
    return known


def _check_tensors(args: Mapping[str, Any], checkpoint: CheckpointReader, source: str) -> None:
    """Check that the tensors are those of the arguments, as far as their shapes tell."""
    hidden = checkpoint.shape(EMBEDDING)[1]
    if hidden != args["hidden_size"]:
        raise UserError(
            f"{source}: hidden_size {args['hidden_size']}, but {EMBEDDING} has {hidden}"
        )
    keys = checkpoint.keys()
    untied = args["untie_embeddings_and_output_weights"]
    if untied != (OUTPUT in keys):
        there = "is there" if OUTPUT in keys else "is missing"
        raise UserError(
            f"{source}: untie_embeddings_and_output_weights is {untied}, but {OUTPUT} {there}"
        )
    said, layers = layers_with_weights(args, megatron_layers(args)), _layers(checkpoint)
    if layers != said:
        name = "num_layers" if pattern_of(args) is None else "hybrid_layer_pattern of"
        raise UserError(f"{source}: {name} {said}, but there are {layers} layers")
    learned = args["position_embedding_type"] == "learned_absolute"
    if learned:
        required({POSITIONS: POSITIONS in keys}, POSITIONS, source, (True,))
        longest, rows = args["max_position_embeddings"], checkpoint.shape(POSITIONS)[0]
        if rows != longest:
            raise UserError(
                f"{source}: max_position_embeddings {longest}, but {POSITIONS} has {rows} rows"
            )


def _layers(checkpoint: CheckpointReader) -> int:
    """Return the number of layers that the tensors have, stacked or numbered."""
    names = checkpoint.keys()
    keys = [key for key in names if key.startswith("decoder.layers.")]
    numbers = {int(match[1]) for key in keys if (match := _NUMBERED.match(key))}
    return len(numbers) if numbers else checkpoint.shape(keys[0])[0]
