"""Throughput: supervised tokens per second and GPU, and TFLOP/s of what is really computed.

Megatron's own count of operations is that of a model trained as a whole. Here the base only runs
forward, the draft runs K passes, and heads see supervised positions alone.

K: TTT steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_args, get_tensorboard_writer, get_timers, get_wandb_writer
from torch import Tensor

from megatron_eagle.compat import patch, require
from megatron_eagle.model import EagleGPTModel
from megatron_eagle.objective.batch import EagleBatch

_TRAINER = "megatron.training.training"
_TRAINING_LOG = f"{_TRAINER}:training_log"
_FLOPS = f"{_TRAINER}:num_floating_point_operations"
RATE = "supervised_tokens_per_second_per_gpu"
_FORWARD, _TRAINED = 2, 6
"""Operations per weight and position: a forward alone; with backward, twice as many more."""


@dataclass(frozen=True)
class Cost:
    """Operations of one rank for each unit of a micro-batch's size.

    Attributes:
        token: per token, of the base's forward, fc and what all rows take part in of the draft's
            first pass.
        pair: per pair of a token and an earlier one, in the attention of the same.
        live: per live row, of the rest of the first pass and of all later ones.
        target: per target position, the teacher's product.
        judged: per supervised position and step, the draft's head.
    """

    token: float
    pair: float
    live: float
    target: float
    judged: float

    @classmethod
    def of(cls, model: EagleGPTModel) -> Cost:
        """Count the weights on this rank; the draft's passes are shared out over the stages."""
        steps, stages = model.options.train.ttt_steps, model.exchange.stages
        base, draft = model.base, model.draft
        trained = _TRAINED / stages
        layers, decoder = _weights(draft.layers, draft.config), base.gpt.decoder
        fc = sum(parameter.numel() for parameter in draft.fc.parameters())
        repeated = layers + (fc if draft.algorithm.joins_by_fc else 0)
        narrow = _weights(draft.layers[-1], draft.config) - draft.narrowing.trunk_weights()
        pair = _FORWARD * _attention(getattr(decoder, "layers", ()), base.config)
        head = draft.lm_head()
        return cls(
            token=_FORWARD * _weights(decoder, base.config) + trained * (fc + layers - narrow),
            pair=pair + trained * _attention(draft.layers, draft.config),
            live=trained * (narrow + (steps - 1) * repeated),
            target=_FORWARD * base.output_weight.numel() / stages,
            judged=(trained if head.requires_grad else 2 * _FORWARD / stages) * head.numel(),
        )


def _weights(module: torch.nn.Module, config: Any) -> float:
    """Count the matrices' elements that a token meets: of experts, those that it is routed to."""
    experts = config.num_moe_experts
    share = config.moe_router_topk * config.expert_model_parallel_size / experts if experts else 1.0
    return sum(
        parameter.numel() * (share if ".experts." in name else 1.0)
        for name, parameter in module.named_parameters()
        if parameter.dim() > 1
    )


def _attention(layers: Any, config: Any) -> float:
    """Return the products of a query with a key and a value, over this rank's heads and layers."""
    heads = config.num_attention_heads / config.tensor_model_parallel_size
    if config.multi_latent_attention:
        channels = config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim
    else:
        channels = 2 * config.kv_channels
    return len(layers) * heads * channels


class Throughput:
    """Counts the work of an interval on the host, and adds two figures to Megatron's logging.

    ``rate`` is the latest number of supervised tokens per second and GPU. The keys of the trunk
    that later passes attend to are not counted: they are few operations.
    """

    def __init__(self) -> None:
        self.cost: Cost | None = None
        self._work = self._iterations = 0.0
        self._rows: list[Tensor] = []
        self._flops = 0.0
        self.rate = 0.0

    def saw(self, model: EagleGPTModel) -> None:
        """Take the costs from the ``model`` that this rank has built."""
        self.cost = Cost.of(model)

    def read(self, batch: EagleBatch) -> None:
        """Count a micro-batch on the host; no device is asked."""
        if self.cost is None:
            return
        sequences, length = batch.tokens.shape
        ranks = mpu.get_context_parallel_world_size()
        if batch.packing is None:
            pairs = sequences * length**2 / 2
        else:
            spans = (span for spans in batch.packing.documents for span in spans)
            pairs = sum((stop - start) ** 2 / 2 for start, stop in spans)
        self._work += (
            self.cost.token * batch.tokens.numel() / ranks
            + self.cost.pair * pairs / ranks
            + self.cost.live * batch.live.index.numel()
            + self.cost.target * batch.target_rows.numel()
            + self.cost.judged * int(batch.step_mask.sum())
        )

    def attach(self) -> None:
        """Attach to Megatron's trainer; call this before ``pretrain()``."""
        training_log = require(_TRAINING_LOG)

        def logged(
            metrics: dict, totals: dict, rate: Any, iteration: int, *rest: Any, **kw: Any
        ) -> Any:
            self._iterations += 1
            if "supervised_rows" in metrics:  # the last pipeline stage alone has metrics, and logs
                self._rows.append(metrics["supervised_rows"])
            self._flops = self._work / self._iterations
            ends = iteration % get_args().log_interval == 0
            if ends and self._rows:
                self._log(totals, iteration, advances=not rest[2])
            result = training_log(metrics, totals, rate, iteration, *rest, **kw)
            if ends:
                self._work = self._iterations = 0.0
                self._rows.clear()
            return result

        def operations(args: Any, *_: Any, **__: Any) -> float:
            return self._flops * args.world_size  # all ranks work as much as this one

        patch(_TRAINING_LOG, logged, "supervised tokens per second")
        patch(_FLOPS, operations, "operations of a frozen base and a draft")

    def _log(self, totals: dict, iteration: int, *, advances: bool) -> None:
        """Add the rate to the sums of the interval, from which Megatron's log line takes means."""
        seconds = get_timers()("interval-time").elapsed(reset=False)
        rows = float(torch.stack(self._rows).sum())
        value = rows / max(seconds, 1e-9) / get_args().world_size
        steps = totals.get("advanced iterations", 0) + advances
        totals[RATE] = torch.tensor([value * steps])
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        if writer is not None:
            writer.add_scalar(RATE, value, iteration)
        if wandb is not None:
            wandb.log({RATE: value}, iteration)
        self.rate = value
