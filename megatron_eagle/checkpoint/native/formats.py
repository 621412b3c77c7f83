"""Name the way out for checkpoints in a format that cannot be read in any layout."""

from __future__ import annotations

from pathlib import Path

from megatron_eagle.errors import UserError, literal

CONVERTER = (
    "Megatron-LM rewrites it when it loads it with ckpt-convert-format torch_dist and "
    "ckpt-convert-save"
)


def refuse_other_formats(directory: Path) -> None:
    """Raise ``UserError`` if the iteration ``directory`` is in another format than torch_dist."""
    if any(directory.glob("mp_rank_*")):
        raise UserError(f"{literal(directory)}: format 'torch' is not supported; {CONVERTER}")
    files = (directory / name for name in (".metadata", "metadata.json"))
    if [file.is_file() for file in files] == [True, False]:
        raise UserError(
            f"{literal(directory)}: incomplete torch_dist checkpoint, metadata.json is missing "
            "(one of format fsdp_dtensor has none and is not supported: save it as torch_dist)"
        )


def refused_backend(path: Path, backend: object) -> UserError:
    """Return the error for a metadata.json that names another ``backend`` than torch_dist."""
    way_out = f"; {CONVERTER}" if backend == "zarr" else ""
    return UserError(
        f"{literal(path)}: sharded_backend {literal(repr(backend))} is not supported, only "
        f"'torch_dist'{way_out}"
    )
