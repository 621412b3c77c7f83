"""Read the objects that Megatron pickles into a checkpoint, without running anything in them.

Megatron-LM 0.19 keeps its common state (the arguments, the iteration) as an object inside the shard
files, older releases in ``common.pt``; both are archives of ``torch.save``. An unpickler calls
whatever a pickle names. This one makes of every name that Megatron's own common state holds either
plain data or an inert stand-in, imports nothing, and refuses all other names.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import IO, Any

from megatron_eagle.checkpoint.safe_metadata import read_metadata
from megatron_eagle.checkpoint.safe_unpickler import FLOATS, INTEGERS, ForbiddenClassError
from megatron_eagle.errors import UserError, literal

COMMON_KEY = "common_state/shard_0_1"
COMMON_FILE = "common.pt"
LARGEST = 2**30
"""Bytes of a common state that are read at most; arguments take some ten thousand."""


class StandIn:
    """Take the place of an object whose content nobody reads: an enum, a generator, a tensor."""

    def __init__(self, *_arguments: Any) -> None:
        """Accept what the pickle passes."""

    def __setstate__(self, _state: Any) -> None:
        """Accept what the pickle stores."""


def _ordered(*pairs: Any) -> dict[Any, Any]:
    return dict(*pairs)


_PLAIN: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): Namespace,
    ("collections", "OrderedDict"): _ordered,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "bytearray"): bytearray,
}
"""Classes of plain data, which take what a pickle says as it is."""

_STAND_INS = {
    ("types", "SimpleNamespace"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("signal", "Signals"),
    ("io", "BytesIO"),
    ("_io", "BytesIO"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.dtypes", "UInt32DType"),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._C", "Generator"),
    *(("torch", name) for name in (*FLOATS, *INTEGERS, "Size", "device", "Tensor")),
}
"""What Megatron's own safe globals name besides; read as stand-ins, never called."""


class _ObjectUnpickler(pickle.Unpickler):
    """Unpickler that knows plain data and makes stand-ins; it imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        of_megatron = module.startswith(("megatron.core.", "megatron.training."))
        storage = module == "torch" and name.endswith("Storage")
        if of_megatron or storage or (module, name) in _STAND_INS:
            return StandIn
        raise ForbiddenClassError(f"{module}.{name}")

    def persistent_load(self, _pid: Any) -> StandIn:
        return StandIn()


def read_common_state(directory: Path) -> dict[str, Any] | None:
    """Return the common state of the iteration ``directory``; None if there is none.

    Tensors, enums and other objects in it are stand-ins. Raises ``UserError`` naming the file for
    one that is damaged, and for one that names anything else than a common state holds.
    """
    path = directory / COMMON_FILE
    if path.is_file():
        return _mapping(_load(path.read_bytes(), path), path)
    place = read_metadata(directory / ".metadata")[1].get(COMMON_KEY)
    if place is None:
        return None
    path = directory / place.file
    if not path.is_file():
        raise UserError(f"{literal(path)}: shard file is missing (it holds the common state)")
    if place.length > LARGEST:
        raise UserError(f"{literal(path)}: a common state of {place.length} bytes is not read")
    with path.open("rb") as stream:
        stream.seek(place.start)
        content = stream.read(place.length)
    value = _load(content, path)
    # Megatron writes an object as the list of one object per shard.
    return _mapping(value[0] if isinstance(value, list) and value else value, path)


def _load(content: bytes, path: Path) -> Any:
    """Unpickle the archive of ``torch.save`` in ``content``."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            if archive.getinfo(name).file_size > LARGEST:
                raise ValueError("too large")
            with archive.open(name) as stream:
                return _unpickle(stream)
    except ForbiddenClassError as error:
        raise UserError(
            f"{literal(path)}: refusing to unpickle {literal(str(error))}: nothing that Megatron "
            "saves of a model"
        ) from error
    except Exception as error:  # zip and pickle each fail in their own way
        raise UserError(
            f"{literal(path)}: the common state cannot be read ({type(error).__name__})"
        ) from error


def _unpickle(stream: IO[bytes]) -> Any:
    return _ObjectUnpickler(stream).load()


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{literal(path)}: the common state is no dictionary")
    return value
