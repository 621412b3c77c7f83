"""Choose between MKL and oneDNN for fp32 products by a short measurement of both.

Which one is faster follows from the processor, the libraries' versions and the number of threads,
and from no name that could be looked up. The choice is kept in the user's cache directory: all
processes of a machine multiply with one kernel and round alike, and later runs do not measure. To
measure again, delete the file that the log names. It is CPU time that is measured: a choice stands
for long, and other processes must not make it.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ADVANTAGE = 1.1
"""How much faster oneDNN must be. It cannot add to its output, and a tie should not be decided by
noise."""
_ROWS, _INPUTS, _OUTPUTS = 256, 512, 1536
_ROUNDS = 7
_FLOP = 2 * _ROWS * _INPUTS * _OUTPUTS


@cache
def onednn_is_faster() -> bool:
    """Tell whether fp32 products should go to oneDNN: by an earlier choice on this machine, or by a
    measurement of half a second. Called when the first product is made, never at import."""
    if not torch.backends.mkldnn.is_available():
        return False
    setting = {
        "processor": _processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clock": "cpu",
    }
    return kept_choice(_cache_directory(), setting, measure_speeds)


def kept_choice(
    directory: Path, setting: dict[str, Any], measure: Callable[[], dict[str, float]]
) -> bool:
    """Return the choice kept in ``directory`` for ``setting``, or make it and keep it.

    ``measure`` returns the speeds ``mkl`` and ``onednn``. Of processes that measure at the same
    time the first to finish chooses for all. A directory that cannot be used costs a measurement
    per process.
    """
    name = sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]
    path = directory / f"fp32-products-{name}.json"
    choice = _read(path)
    if choice is None:
        speeds = measure()
        choice = speeds["onednn"] > ADVANTAGE * speeds["mkl"]
        record = {**setting, **{f"{k}_gflops": round(v, 1) for k, v in speeds.items()}}
        choice = _publish(path, {**record, "onednn": choice})
        logger.info("fp32 products by %s, kept in %s", "oneDNN" if choice else "MKL", path)
    return choice


def measure_speeds() -> dict[str, float]:
    """Return GFLOP per second of CPU time of both kernels, the best of a few rounds, over the three
    products of a layer: by a weight, and the gradients of the rows and of the weight."""
    kernels: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "mkl": lambda x, weight: torch.mm(x, weight.t()),
        "onednn": lambda x, weight: torch.ops.mkldnn._linear_pointwise(
            x, weight, None, "none", [], ""
        ),
    }
    with torch.no_grad():
        rows = torch.full((_ROWS, _INPUTS), 0.5)
        weight = torch.full((_OUTPUTS, _INPUTS), 0.5)
        grad = torch.full((_ROWS, _OUTPUTS), 0.5)
        best = dict.fromkeys(kernels, float("inf"))
        for attempt in range(_ROUNDS + 1):
            for name, multiply in kernels.items():
                start = time.process_time()
                multiply(rows, weight)
                multiply(grad, weight.t())
                multiply(grad.t(), rows.t())
                if attempt:  # the first one makes threads and kernels
                    best[name] = min(best[name], time.process_time() - start)
    return {name: 3 * _FLOP / seconds / 1e9 for name, seconds in best.items()}


def _processor() -> str:
    """Return the processor's family, model and instruction sets, as far as the system tells."""
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    pairs = (line.partition(":") for line in lines.split("\n\n")[0].splitlines())
    first = {name.strip(): value.strip() for name, _, value in pairs}
    named = [first.get(name, "") for name in ("vendor_id", "cpu family", "model", "model name")]
    return " ".join([platform.machine(), *named, torch.backends.cpu.get_cpu_capability()])


def _cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "megatron_eagle"


def _read(path: Path) -> bool | None:
    """Return the choice in ``path``; None if there is none that can be read."""
    try:
        choice = json.loads(path.read_text())["onednn"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return choice if isinstance(choice, bool) else None


def _publish(path: Path, record: dict[str, Any]) -> bool:
    """Write ``record`` unless another process has; return the choice that stands."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=".products-")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(json.dumps(record, indent=1))
            if path.exists() and _read(path) is None:
                os.replace(draft, path)  # what is there cannot be read
                return bool(record["onednn"])
            with suppress(FileExistsError):
                os.link(draft, path)
        finally:
            Path(draft).unlink(missing_ok=True)
    except OSError:
        return bool(record["onednn"])
    choice = _read(path)
    return bool(record["onednn"]) if choice is None else choice
