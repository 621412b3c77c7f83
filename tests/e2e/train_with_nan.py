"""The example, with a loss that is NaN in iteration 3, on the last rank alone."""

from __future__ import annotations

import torch

from megatron_eagle.platform import enable

enable()

from megatron.training import get_args  # noqa: E402

from megatron_eagle.cli.train import main  # noqa: E402
from megatron_eagle.training.step import ForwardStep  # noqa: E402

BAD_ITERATION = 3
loss_of = ForwardStep.loss


def loss_of_nan(
    self: ForwardStep, output: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    loss, divisor, report = loss_of(self, output)
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    if last and get_args().curr_iteration + 1 == BAD_ITERATION:
        loss = loss * float("nan")
    return loss, divisor, report


if __name__ == "__main__":
    ForwardStep.loss = loss_of_nan  # type: ignore[method-assign]
    raise SystemExit(main())
