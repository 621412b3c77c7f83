"""The example, with a check around it that training left every bit of the base alone."""

from __future__ import annotations

import torch

from megatron_eagle.platform import enable

enable()

from megatron_eagle.cli.train import main  # noqa: E402
from megatron_eagle.training.builder import ModelBuilder  # noqa: E402

built: list = []
build = ModelBuilder.__call__


def build_and_remember(self: ModelBuilder, *args: object, **kwargs: object) -> object:
    model = build(self, *args, **kwargs)
    before = {name: value.clone() for name, value in tensors(model.base)}
    assert len(before) > 20
    built.append((model, before))
    return model


def tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


if __name__ == "__main__":
    ModelBuilder.__call__ = build_and_remember  # type: ignore[method-assign]
    destroy = torch.distributed.destroy_process_group
    main()
    model, before = built[0]
    after = dict(tensors(model.base))
    assert set(after) == set(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), f"{name} changed"
    assert not model.base.training and not any(p.requires_grad for p in model.base.parameters())
    assert all(p.grad is None for p in model.base.parameters())
    print("THE BASE IS UNCHANGED", flush=True)
