"""Give every pipeline stage the base's embedding and output layer.

The draft of every stage looks up the base's embedding and multiplies by its output layer, which
Megatron keeps on the first and the last stage only. The others load frozen shards of their own.

Shape letters: Vp this rank's rows of the base's padded vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.compat import MegatronModule, make_tp_sharded_tensor_for_checkpoint

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


class VocabShards(MegatronModule):
    """Hold this TP rank's rows [Vp, H] of the embedding and the output layer, on any stage.

    It has parameters of its own only for the matrices that ``gpt``'s stage lacks;
    :mod:`megatron_eagle.teacher.build` loads them with the base.
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
        """[Vp, H]."""
        (borrowed,) = self._borrowed["embedding"]
        return self.embedding if borrowed is None else borrowed

    @property
    def output_weight(self) -> Tensor:
        """[Vp, H]; the embedding itself where the base ties the two."""
        (borrowed,) = self._borrowed["output"]
        if borrowed is not None:
            return borrowed
        return self.embedding_weight if self._tied else self.output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return this module's own parameters under the names of the base's checkpoint."""
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
