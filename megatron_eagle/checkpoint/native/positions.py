"""The position embedding of a trained GPT, as Megatron arguments and as a rope description.

Megatron computes yarn and interpolation by modules of their own; here, as for imported bases, they
are descriptions from which ``megatron_eagle.attention.rope`` sets the frequencies of one module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_eagle.errors import UserError, literal

Args = Mapping[str, Any]

KINDS = ("rope", "yarn", "learned_absolute", "none")
TRAINERS_FACTOR = 8.0
"""Factor of scaled rope in every model of Megatron-LM's trainer, which ignores its own flag."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def position_args(args: Args, source: str) -> dict[str, Any]:
    """Return the Megatron arguments of the positions; yarn is rope with a description."""
    kind = args.get("position_embedding_type")
    if kind is None and "position_embedding_type" not in args:
        raise UserError(f"{source}: the arguments of this checkpoint lack position_embedding_type")
    if kind not in KINDS or args.get("add_position_embedding") is False:
        known = ", ".join(KINDS)
        raise UserError(
            f"{source}: position_embedding_type {literal(kind)} is not supported; known: {known}"
        )
    theta = args.get("rotary_base", 10000)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta != int(theta):
        raise UserError(f"{source}: rotary_base {literal(theta)} is not an integer")
    given: dict[str, Any] = {
        "position_embedding_type": "rope" if kind == "yarn" else kind,
        "rotary_base": int(theta),
        "rotary_percent": float(args.get("rotary_percent", 1.0)),
    }
    if args.get("rotary_interleaved"):
        given["rotary_interleaved"] = True
    if args.get("no_rope_freq") is not None:
        given["no_rope_freq"] = args["no_rope_freq"]
    if args.get("multi_latent_attention"):
        return given | _mla_args(args, kind, source)
    if kind == "rope" and args.get("use_rope_scaling"):
        given |= {"use_rope_scaling": True, "rope_scaling_factor": _llama3_factor(args)}
    return given


def rope_description(args: Args, source: str) -> dict[str, Any]:
    """Return what ``attention/rope.py`` computes angles from, empty for plain or llama3 rope."""
    factor = args.get("rotary_seq_len_interpolation_factor")
    kind, mla = args.get("position_embedding_type"), bool(args.get("multi_latent_attention"))
    theta = float(args.get("rotary_base", 10000))
    if factor is not None and not mla and kind in ("rope", "yarn"):
        if kind == "yarn" or args.get("use_rope_scaling"):
            raise UserError(
                f"{source}: rotary_seq_len_interpolation_factor beside another scaling of rope is "
                "not supported"
            )
        return {"rope_type": "linear", "rope_theta": theta, "factor": float(factor)}
    if mla and args.get("rope_type") != "rope":
        return _yarn(args, theta, "")
    return _yarn(args, theta, "yarn_") if kind == "yarn" and not mla else {}


def rope_of_config(megatron_args: Args, rope: Args, mscale: float = 1.0) -> dict[str, Any]:
    """Return the rope fields of a config.json: ``rope_theta``, and ``rope_scaling`` if scaled.

    Readers of latent attention take the scale of its scores from ``mscale`` and
    ``mscale_all_dim``, as Megatron does.
    """
    theta = float(megatron_args["rotary_base"])
    if megatron_args.get("use_rope_scaling"):
        rope = {"rope_type": "llama3", "factor": megatron_args["rope_scaling_factor"], **LLAMA3}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    if scaling and megatron_args.get("multi_latent_attention"):
        scaling |= {"mscale": mscale, "mscale_all_dim": megatron_args["mscale_all_dim"]}
    return {"rope_theta": theta, **({"rope_scaling": scaling} if scaling else {})}


def _llama3_factor(args: Args) -> float:
    """Return the factor the model was run with: Megatron-Bridge's own, or the trainer's."""
    return float(args["rope_scaling_factor"]) if args.get("of_bridge") else TRAINERS_FACTOR


def _mla_args(args: Args, kind: Any, source: str) -> dict[str, Any]:
    """Return the arguments of rope in multi-latent attention.

    Megatron takes the scale of its scores from ``rotary_scaling_factor`` and ``mscale_all_dim``
    whatever ``rope_type`` is. The angles come from a module of this package, which answers as
    Megatron's yarn module does.
    """
    if kind not in ("rope", "yarn"):
        raise UserError(f"{source}: multi_latent_attention without rope is not supported")
    if args.get("rotary_percent", 1.0) != 1.0 or args.get("no_rope_freq") is not None:
        raise UserError(f"{source}: rotary_percent and no_rope_freq beside latent attention")
    scaled = args.get("mscale_all_dim") and (args.get("rotary_scaling_factor") or 1.0) > 1.0
    if args.get("rope_type") == "rope" and scaled:
        raise UserError(f"{source}: mscale_all_dim beside rope_type rope is not supported")
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(args.get("rotary_scaling_factor", 1.0)),
        "mscale_all_dim": float(args.get("mscale_all_dim", 0.0)),
    }


def _yarn(args: Args, theta: float, prefix: str) -> dict[str, Any]:
    """Return the description of yarn; unscaled rope where its factor is 1."""

    def value(name: str, default: Any) -> Any:
        found = args.get(prefix + name)
        return default if found is None else found

    scale = float(args.get("rotary_scaling_factor") or 1.0)
    if scale <= 1.0:
        return {}
    mscale, all_dim = args.get("mscale", 1.0), args.get("mscale_all_dim", 0.0)
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": scale,
        "beta_fast": float(value("beta_fast", 32.0)),
        "beta_slow": float(value("beta_slow", 1.0)),
        "truncate": bool(value("correction_range_round_to_int", True)),
        "attention_factor": _mscale(scale, mscale) / _mscale(scale, all_dim),
        "original_max_position_embeddings": int(value("original_max_position_embeddings", 4096)),
    }


def _mscale(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1.0 else 0.1 * mscale * math.log(scale) + 1.0
