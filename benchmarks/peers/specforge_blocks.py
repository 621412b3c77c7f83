"""SpecForge's DFlash and DSpark training models, with its SDPA attention (flex needs a GPU).

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


class SpecForgeStep:
    """The forward pass of the library's training ``model``; call it for the loss.

    The library draws its anchors itself, so its draw is replaced by the problem's anchors.
    """

    def __init__(self, problem: BlockProblem) -> None:
        kind = "dspark" if problem.next_token else "dflash"
        family: Any = importlib.import_module("specforge.algorithms.common.dflash_family_model")
        drafts: Any = importlib.import_module(f"specforge.modeling.draft.{kind}")
        config = draft_config(problem)
        ce, kl, l1 = problem.loss_weights
        if kl or (l1 and not problem.next_token):
            raise ValueError(f"SpecForge's {kind} has no loss {problem.loss}")
        if problem.next_token:
            config.dflash_config |= {"markov_rank": problem.rank, "markov_head_type": "vanilla"}
            draft = drafts.DSparkDraftModel(config)
            build, weights = family.OnlineDSparkModel, {
                "dspark_ce_loss_alpha": ce, "dspark_l1_loss_alpha": l1,
                "dspark_confidence_head_alpha": 0.0,
            }  # fmt: skip
        else:
            draft, build, weights = drafts.DFlashDraftModel(config), family.OnlineDFlashModel, {}
        load_draft(draft, problem)
        inputs = problem.inputs()
        embedding, head = base_modules(inputs)
        self.model = build(
            draft, head, embedding, mask_token_id=problem.mask_token, block_size=problem.block,
            attention_backend="sdpa", num_anchors=problem.anchors, loss_decay_gamma=DECAY,
            **weights,
        ).train()  # fmt: skip
        anchors = inputs.anchors[None], torch.ones(1, problem.anchors, dtype=torch.bool)
        self.model._sample_anchor_positions = lambda *_: anchors
        self.inputs = [inputs.tokens[None], inputs.aux[None], inputs.supervised[None]]
        if problem.next_token:
            self.inputs.append(inputs.final_hidden[None])

    def __call__(self) -> Tensor:
        loss: Tensor = self.model(*self.inputs)[0]
        return loss


def build(problem: BlockProblem) -> tuple[SpecForgeStep, list[Tensor]]:
    """Build the forward pass; return it and the tensors at rest."""
    step = SpecForgeStep(problem)
    return step, [*step.model.parameters(), *step.model.buffers(), *step.inputs]
