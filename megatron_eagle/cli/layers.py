"""``--transformer-impl`` of commands that run a base without the trainer."""

from __future__ import annotations

from megatron_eagle.errors import UserError

IMPLEMENTATIONS = ("local", "transformer_engine")
"""Values of the flag: Megatron-Core's own modules, the default, and Transformer Engine's."""


def check_device(implementation: str, *, on_cpu: bool) -> None:
    """Raise ``UserError`` for modules that this machine has no kernels for."""
    if on_cpu and implementation != IMPLEMENTATIONS[0]:
        raise UserError(f"<transformer_impl> {implementation} needs a CUDA device")
