"""Layers of a GPT that differ in their parts (heterogeneous layers, as in Llama-Nemotron models).

In such a model a layer may lack its attention or its MLP, or have a square matrix in the place of
either, and MLPs differ in width. Megatron's parser takes the layers as one JSON text, in which much
may be said in two ways; a description holds the one spelling that ``blocks_text`` gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BLOCKS = "heterogeneous_layers_config_encoded_json"
"""Name of the argument."""
PATH = "heterogeneous_layers_config_path"
"""Name of another argument, whose value tells Megatron that there are such layers."""
LARGEST_WIDTH = 2**24
NEEDED: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "group_query_attention": True,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "use_rope_scaling": True,
    "multi_latent_attention": False,
    "apply_layernorm_1p": False,
    "num_experts": None,
}
"""Arguments -> the values beside which Megatron's parser and its builder know such layers."""


@dataclass(frozen=True)
class Block:
    """Parts of one layer.

    Attributes:
        attends: whether it has attention.
        ffn: width of its MLP; None if it has none.
        attention_matrix, ffn_matrix: whether a matrix stands in the place of a part that is
            missing.
    """

    attends: bool
    ffn: int | None
    attention_matrix: bool = False
    ffn_matrix: bool = False

    @property
    def has_weights(self) -> bool:
        """Return whether a checkpoint holds anything of it."""
        return self.attends or self.ffn is not None or self.attention_matrix or self.ffn_matrix


def blocks_text(blocks: Sequence[Block], args: Mapping[str, Any]) -> str:
    """Return the layers as Megatron's parser takes them, with what it compares with its other
    arguments ``args``."""
    heads = args["num_attention_heads"]
    content = {
        "hidden_act": "silu",
        "num_hidden_layers": len(blocks),
        "hidden_size": args["hidden_size"],
        "num_attention_heads": heads,
        "tie_word_embeddings": not args["untie_embeddings_and_output_weights"],
        "rope_theta": args["rotary_base"],
        "rope_scaling": {"factor": args["rope_scaling_factor"]},
        "block_configs": [_as_dict(block, heads // args["num_query_groups"]) for block in blocks],
    }
    return json.dumps(content, separators=(",", ":"))


def _as_dict(block: Block, heads_in_group: int) -> dict[str, Any]:
    return {
        "attention": {
            "n_heads_in_group": heads_in_group if block.attends else None,
            "no_op": not block.attends and not block.attention_matrix,
            "replace_with_linear": block.attention_matrix,
        },
        "ffn": {
            "ffn_hidden_size": block.ffn,
            "no_op": block.ffn is None and not block.ffn_matrix,
            "replace_with_linear": block.ffn_matrix,
        },
    }


def blocks_of(args: Mapping[str, Any]) -> list[Block] | None:
    """Return the layers in the Megatron arguments of a base, which ``check_megatron_args`` has
    checked; None for a base whose layers are alike."""
    text = args.get(BLOCKS)
    return None if text is None else _parse(text)


def layers_with_weights(args: Mapping[str, Any], layers: int) -> int:
    """Return how many of the ``layers`` of a base have weights."""
    blocks = blocks_of(args)
    return layers if blocks is None else sum(block.has_weights for block in blocks)


def mlp_widths(args: Mapping[str, Any]) -> dict[str, int]:
    """Return the widths of MLPs of single layers, by what a message calls them; empty for a base
    whose layers are alike."""
    widths = {i: block.ffn for i, block in enumerate(blocks_of(args) or ())}
    return {f"ffn_hidden_size of layer {i}": ffn for i, ffn in widths.items() if ffn is not None}


def blocks_fault(value: Any) -> str | None:
    """Return None for a text that ``blocks_text`` may have given, else the words for it."""
    wanted = "the JSON of heterogeneous layers that describe-base writes"
    try:
        blocks = _parse(value)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return wanted
    fits = all(
        block.ffn is None or (type(block.ffn) is int and 0 < block.ffn <= LARGEST_WIDTH)
        for block in blocks
    )
    return None if fits and blocks else wanted


def agrees(args: Mapping[str, Any]) -> bool:
    """Return whether Megatron knows the layers beside the other arguments, and their text is the
    one spelling of them."""
    blocks = _parse(args[BLOCKS])
    alike = len(blocks) == args["num_layers"] and not unfit(args)
    return alike and args[BLOCKS] == blocks_text(blocks, args)


def unfit(args: Mapping[str, Any]) -> list[str]:
    """Return the names of arguments beside which Megatron does not build such layers."""
    return [name for name, wanted in NEEDED.items() if (args.get(name) or None) != (wanted or None)]


def _parse(text: str) -> list[Block]:
    """Return the blocks in a text of ``blocks_text``."""
    return [
        Block(
            attends=block["attention"]["n_heads_in_group"] is not None,
            ffn=block["ffn"]["ffn_hidden_size"],
            attention_matrix=block["attention"]["replace_with_linear"] is True,
            ffn_matrix=block["ffn"]["replace_with_linear"] is True,
        )
        for block in json.loads(text)["block_configs"]
    ]
