"""The variants of the quality study, in groups whose drafts are trained and evaluated alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Flags = Mapping[str, str | None]
"""Flag -> value. None takes a common flag away, and a switch has an empty value."""


@dataclass(frozen=True)
class Group:
    """Variants that are compared with each other.

    Attributes:
        variants: each by the flags in which it differs from ``common``.
        iterations: how many answers each is trained on, if the user does not say.
        evaluation: flags of the evaluation.
        reference: the variant whose training's FLOP the ``matched`` variants get in a second
            training, in as many iterations as they need for it.
        aux_layers: base layers whose outputs on the data are computed once and stored, for all
            variants that read the base's layers.
    """

    variants: Mapping[str, Flags]
    common: Flags
    iterations: int
    evaluation: tuple[str, ...]
    reference: str | None = None
    matched: tuple[str, ...] = ()
    aux_layers: tuple[int, ...] = ()

    def flags(self, name: str) -> dict[str, str]:
        """Return the draft's flags of a variant."""
        chosen = {**self.common, **self.variants[name]}
        return {flag: value for flag, value in chosen.items() if value is not None}

    def reads_stored_features(self, name: str) -> bool:
        """Return whether a variant is trained from the stored outputs of the base's layers."""
        return bool(self.aux_layers) and self.flags(name).get("--eagle-algorithm") != "mtp"


EAGLE = Group(
    variants={
        "kl-k3": {},
        "kl-k3, seed 2": {"--seed": "4321"},
        "kl-k1": {"--eagle-ttt-steps": "1"},
        "kl-k5": {"--eagle-ttt-steps": "5"},
        "lk-alpha": {"--eagle-loss": "lk-alpha"},
        "lk-lambda": {"--eagle-loss": "lk-lambda"},
        "eagle3.1": {"--eagle-algorithm": "eagle3.1"},
        "base-init": {"--eagle-init-from-base": ""},
        "base-init, lk-lambda": {"--eagle-init-from-base": "", "--eagle-loss": "lk-lambda"},
        "base-init, 2 layers": {"--eagle-init-from-base": "", "--eagle-num-layers": "2"},
        "base-init, lr 1e-3": {"--eagle-init-from-base": "", "--lr": "1e-3"},
        "vocab-4k": {"--eagle-draft-vocab-size": "4096"},
        "vocab-full": {"--eagle-draft-vocab-size": None},
    },
    common={"--eagle-ttt-steps": "3", "--eagle-draft-vocab-size": "8192"},
    iterations=600,
    evaluation=("--draft-tokens", "3"),
)
"""EAGLE drafts."""


def _block(algorithm: str, block: int, layers: int, **others: str) -> Flags:
    """Return the flags of a block draft; ``others`` by their flag's name behind ``--eagle-``."""
    flags: dict[str, str | None] = {
        "--lr": "6e-4",  # at EAGLE-3's rate, 2e-3, DFlash learns next to nothing
        "--eagle-algorithm": algorithm,
        "--eagle-block-size": str(block),
        "--eagle-num-layers": str(layers),
        "--eagle-mask-token": "16",  # <empty_output>, which no text of the data uses
    }
    return flags | {f"--eagle-{name.replace('_', '-')}": value for name, value in others.items()}


_AUX_LAYERS = (1, 8, 14, 20, 27)
_CE = {"ce_weight": "1", "l1_weight": "0"}
_KL = {"ce_weight": "0", "kl_weight": "1", "l1_weight": "0"}
BLOCKS = Group(
    variants={
        "eagle3": {},
        "eagle3, 2 layers": {"--eagle-num-layers": "2"},
        "eagle3, base-init": {"--eagle-init-from-base": ""},
        "mtp": {
            "--eagle-algorithm": "mtp",
            "--eagle-draft-vocab-size": None,
            "--eagle-aux-layers": None,
        },
        "dflash b4": _block("dflash", 4, 2),
        "dflash b4, 1 layer": _block("dflash", 4, 1),
        "dflash b4, 5 layers": _block("dflash", 4, 5),
        "dflash b4, kl": _block("dflash", 4, 2, **_KL),
        "dflash b4, base-init": _block("dflash", 4, 2, init_from_base=""),
        "dflash b8": _block("dflash", 8, 2),
        "dflash b8, d-pace": _block("dflash", 8, 2, position_weights="d-pace"),
        "dflash b8, 5 layers": _block("dflash", 8, 5),
        "dspark b4": _block("dspark", 4, 2),
        "dspark b4, 1 layer": _block("dspark", 4, 1),
        "dspark b4, 5 layers": _block("dspark", 4, 5),
        "dspark b4, ce": _block("dspark", 4, 2, **_CE),
        "dspark b4, kl": _block("dspark", 4, 2, **_KL),
        "dspark b4, base-init": _block("dspark", 4, 2, init_from_base=""),
        "dspark b8": _block("dspark", 8, 2),
    },
    common={
        "--eagle-draft-vocab-size": "4096",
        "--eagle-aux-layers": " ".join(map(str, _AUX_LAYERS)),
    },
    iterations=300,
    evaluation=("--limit", "40", "--batch-size", "40", "--max-new-tokens", "32"),
    reference="dflash b4",
    matched=("eagle3", "mtp", "dflash b4, 5 layers", "dspark b4", "dflash b8", "dspark b8"),
    aux_layers=_AUX_LAYERS,
)
"""Block drafts and an MTP module beside EAGLE-3, all reading the same layers of the base."""

GROUPS = {"eagle": EAGLE, "blocks": BLOCKS}
