"""Run ``benchmarks/gpu.py`` on a CPU with Transformer Engine's modules, kernels computed in torch.

python -m tests.helpers.te_gpu_kit FLAGS ...
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

from tests.helpers.te_python import install_te


def main() -> int:
    install_te()
    from megatron_eagle.platform import enable

    enable()
    from benchmarks import gpu
    from tests.helpers import draft_fixture

    build = draft_fixture.build_model

    def as_on_a_gpu(case: Any) -> Any:
        with mock.patch("torch.cuda.is_available", lambda: case.layers != "local"):
            return build(case)

    with mock.patch.object(draft_fixture, "build_model", as_on_a_gpu):
        return gpu.main()


if __name__ == "__main__":
    sys.exit(main())
