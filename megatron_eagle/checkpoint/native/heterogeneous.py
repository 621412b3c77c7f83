"""What the arguments of a GPT with heterogeneous layers say beside those of one with equal layers.

They come from the config.json of a Llama-Nemotron model, in Hugging Face's names or Megatron's.
"""

from __future__ import annotations

import json
from typing import Any

from megatron_eagle.checkpoint.layer_blocks import (
    BLOCKS,
    NEEDED,
    PATH,
    Block,
    blocks_text,
    unfit,
)
from megatron_eagle.checkpoint.native.values import Args
from megatron_eagle.errors import UserError, literal

UNUSED = ("qk_l2_norm",)
"""Arguments at which Megatron does not look where layers are heterogeneous."""


def is_heterogeneous(args: Args) -> bool:
    """Return whether the arguments name layers that differ in their parts."""
    return any(args.get(name) not in (None, "") for name in (PATH, BLOCKS))


def as_heterogeneous(architecture: dict[str, Any], args: Args, source: str) -> dict[str, Any]:
    """Return ``architecture``, that of a GPT with these arguments and equal layers, with its own.

    Raises ``UserError``, starting with ``source``, for layers that are not described as Megatron
    takes them, and for arguments beside which it does not build them.
    """
    for name in unfit(architecture):
        raise UserError(
            f"{source}: {name} {literal(architecture.get(name))} beside heterogeneous layers is "
            f"not supported, only {NEEDED[name]}"
        )
    text = args.get(BLOCKS)
    if text in (None, ""):
        raise UserError(f"{source}: {PATH} without {BLOCKS}: the layers are in another file")
    try:
        blocks = [_read_block(block, architecture) for block in json.loads(text)["block_configs"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{source}: {BLOCKS}: cannot be read ({type(error).__name__}: {literal(str(error))})"
        ) from error
    if len(blocks) != architecture["num_layers"]:
        raise UserError(
            f"{source}: num_layers {architecture['num_layers']}, but {BLOCKS} has {len(blocks)}"
        )
    kept = {name: value for name, value in architecture.items() if name not in UNUSED}
    return {**kept, BLOCKS: blocks_text(blocks, kept)}


def _read_block(block: dict[str, Any], architecture: Args) -> Block:
    """Return one of ``block_configs``; raise ``ValueError`` for a width that is none, and for
    another number of query groups, which Megatron's parser refuses."""
    attention, mlp = block["attention"], block.get("ffn") or block["mlp"]
    missing, matrix = bool(attention.get("no_op")), bool(attention.get("replace_with_linear"))
    attends = not missing and not matrix
    groups = _groups(attention, architecture)
    if attends and groups != architecture["num_query_groups"]:
        raise ValueError(f"a layer with {groups} query groups")
    mlp_missing, mlp_matrix = bool(mlp.get("no_op")), bool(mlp.get("replace_with_linear"))
    has_mlp = not mlp_missing and not mlp_matrix
    return Block(
        attends=attends,
        ffn=_width(mlp, architecture) if has_mlp else None,
        attention_matrix=matrix and not missing,
        ffn_matrix=mlp_matrix and not mlp_missing,
    )


def _groups(attention: dict[str, Any], architecture: Args) -> Any:
    if attention.get("num_query_groups") is not None:
        return attention["num_query_groups"]
    heads = attention.get("n_heads_in_group")
    if "num_query_groups" in attention or heads is None:
        return architecture["num_query_groups"]
    return architecture["num_attention_heads"] / heads


def _width(mlp: dict[str, Any], architecture: Args) -> int:
    """Return the width of an MLP; a factor is Llama's, rounded up to a multiple of 256."""
    if "ffn_hidden_size" in mlp:
        width = mlp["ffn_hidden_size"]
    else:
        width, factor = None, mlp["ffn_mult"]
        if factor is not None:
            width = -(-int(2 * factor * architecture["hidden_size"] / 3) // 256) * 256
    if width is None:
        width = architecture["ffn_hidden_size"]
    if type(width) is not int or width < 1:
        raise ValueError(f"a layer with an MLP of width {width}")
    return width
