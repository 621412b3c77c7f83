"""The base's vocabulary matrices on the pipeline stages that do not hold them.

The draft of every stage looks up the base's embedding and multiplies by its output layer, which
Megatron keeps on the first and the last stage only. The others load frozen shards of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.compat import MegatronModule, make_tp_sharded_tensor_for_checkpoint

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


class VocabShards(MegatronModule):
    """This TP rank's [Vp, H] rows of the embedding and the output layer, whichever stage it is on.

    Holds parameters of its own only for what ``gpt`` lacks; :func:`~megatron_eagle.teacher.build`
    loads them with the base.
    """

    def __init__(self, gpt: Any) -> None:
        super().__init__(config=gpt.config)
        groups = gpt.pg_collection
        self.stage, self.tp_group, self.dp_cp_group = groups.pp.rank(), groups.tp, groups.dp_cp
        tied = gpt.share_embeddings_and_output_weights
        # Of a tied base, Megatron keeps the shared matrix on both ends of the pipeline.
        output = getattr(getattr(gpt, "output_layer", None), "weight", None)
        embedding = gpt.embedding.word_embeddings.weight if gpt.pre_process else None
        if tied:
            embedding = output = output if embedding is None else embedding
        # Lists hide what the base owns from this module's parameters.
        self._borrowed = {"embedding": [embedding], "output": [output]}
        rows = gpt.vocab_size // groups.tp.size()
        if embedding is None:
            self.embedding = self._make(rows)
        if output is None and not tied:
            self.output = self._make(rows)
        self._tied = tied

    def _make(self, rows: int) -> torch.nn.Parameter:
        device = "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.empty(
            rows, self.config.hidden_size, dtype=self.config.params_dtype, device=device
        )
        return torch.nn.Parameter(weight, requires_grad=False)

    @property
    def embedding_weight(self) -> Tensor:
        (borrowed,) = self._borrowed["embedding"]
        return self.embedding if borrowed is None else borrowed

    @property
    def output_weight(self) -> Tensor:
        (borrowed,) = self._borrowed["output"]
        if borrowed is not None:
            return borrowed
        return self.embedding_weight if self._tied else self.output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """This module's own parameters under the names of the base's checkpoint."""
        keys = {"embedding": _EMBEDDING, "output": _OUTPUT}
        return {
            prefix + name: make_tp_sharded_tensor_for_checkpoint(
                parameter,
                keys[name],
                replica_id=(1 + self.stage, 0, self.dp_cp_group.rank()),
                allow_shape_mismatch=True,
                tp_group=self.tp_group,
                dp_cp_group=self.dp_cp_group,
            )
            for name, parameter in self.named_parameters()
        }
