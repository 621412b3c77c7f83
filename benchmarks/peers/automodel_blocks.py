"""NVIDIA NeMo Automodel's DFlash and DSpark training modules, with SDPA (flex needs a GPU).

DFlash's loss is the cross-entropy with the data's tokens; DSpark's adds the L1 distance. Both are
divided by the sum of the weights, as ours.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.block_problem import DECAY, BlockProblem
from benchmarks.peers.qwen3_blocks import base_modules, draft_config, load_draft

_PACKAGE = "nemo_automodel.components.speculative"


class AutomodelStep:
    """The forward pass of the library's training module; call it for the loss.

    The library draws its anchors itself, so its draw is replaced by the problem's anchors.
    """

    def __init__(self, problem: BlockProblem) -> None:
        ce, kl, l1 = problem.loss_weights
        if kl or (l1 and not problem.next_token):
            raise ValueError(f"Automodel's drafts of blocks have no loss {problem.loss}")
        inputs = problem.inputs()
        anchors = inputs.anchors[None], torch.ones(1, problem.anchors, dtype=torch.bool)
        self.inputs = [inputs.tokens[None], inputs.aux[None], inputs.supervised[None]]
        self.frozen: list[Tensor] = []
        if problem.next_token:
            self.model = _dspark(problem, ce, l1, anchors)
            self.inputs.append(inputs.final_hidden[None])
        else:
            core: Any = importlib.import_module(f"{_PACKAGE}.dflash.core")
            draft = core.Qwen3DFlashDraftModel(draft_config(problem))
            load_draft(draft, problem)
            embedding, head = base_modules(inputs)  # held by the module, not registered
            self.frozen = [embedding.weight, head.weight]
            self.model = core.DFlashTrainerModule(
                draft, head, embedding, problem.mask_token, block_size=problem.block,
                attention_backend="sdpa", num_anchors=problem.anchors, loss_decay_gamma=DECAY,
            )  # fmt: skip
            self.model._sample_anchor_positions = lambda *_, **__: anchors
        self.model.train()

    def __call__(self) -> Tensor:
        loss: Tensor = self.model(*self.inputs).loss
        return loss


def build(problem: BlockProblem) -> tuple[AutomodelStep, list[Tensor]]:
    """Build the forward pass; return it and the tensors at rest."""
    step = AutomodelStep(problem)
    resting = [*step.model.parameters(), *step.model.buffers(), *step.frozen, *step.inputs]
    return step, resting


def _dspark(problem: BlockProblem, ce: float, l1: float, anchors: tuple[Tensor, Tensor]) -> Any:
    core: Any = importlib.import_module(f"{_PACKAGE}.dspark.core")
    drafts: Any = importlib.import_module(f"{_PACKAGE}.dspark.draft_qwen3")
    config = draft_config(problem)
    config.num_anchors, config.enable_confidence_head = problem.anchors, False
    config.markov_rank, config.markov_head_type = problem.rank, "vanilla"
    draft = drafts.Qwen3DSparkModel(config)
    load_draft(draft, problem, of_base=("embed_tokens.", "lm_head."))
    embedding, head = base_modules(problem.inputs())
    draft.initialize_embeddings_and_head(embed_tokens=embedding, lm_head=head)
    drafts.sample_anchor_positions = lambda **_: anchors
    return core.DSparkTrainerModule(
        draft, loss_decay_gamma=DECAY, ce_loss_alpha=ce, l1_loss_alpha=l1,
        confidence_head_alpha=0.0,
    )  # fmt: skip
