"""Settings for every test process and its children; `gpu` tests run only where CUDA is there."""

from __future__ import annotations

import os

import pytest

from megatron_eagle.testing import harness

harness.PRELOADED.append("pytest")  # half a second of every rank that imports a test's module

for name, value in {
    "OMP_NUM_THREADS": "1",  # ranks share two cores
    "HF_HUB_OFFLINE": "1",  # a test that needs the network is a mistake
    "TOKENIZERS_PARALLELISM": "false",  # its thread pool warns in every forked child
}.items():
    os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
