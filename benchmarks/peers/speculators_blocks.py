"""vLLM speculators' DFlash and DSpark draft models, with SDPA and eager losses.

Its flex attention and its loss kernels need a GPU. Its loss is the divergence from the base.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.block_problem import DECAY, BlockProblem
from benchmarks.peers.qwen3_blocks import layer_config, load_draft


class SpeculatorsStep:
    """The forward pass of the library's draft ``model``; call it for the loss.

    The library draws its anchors itself, so its draw is replaced by the problem's anchors.
    """

    def __init__(self, problem: BlockProblem) -> None:
        if problem.loss != "kl":
            raise ValueError(f"speculators has no loss {problem.loss} on the data's tokens")
        kind = "dspark" if problem.next_token else "dflash"
        core: Any = importlib.import_module(f"speculators.models.{kind}.core")
        self.backbone: Any = importlib.import_module("speculators.models.dflash.core")
        losses: Any = importlib.import_module("speculators.losses")
        self.options = {"loss_config": losses.resolve_loss_config("kl_div", "eager")}
        if problem.next_token:  # for its metrics; the default is a Triton kernel
            self.options["tv_loss_fn"] = losses.resolve_loss_config("tv", "eager")["tv"][0]
        self.model = _build_model(problem, kind, core)
        inputs = problem.inputs()
        self.anchors = inputs.anchors, torch.ones(problem.anchors, dtype=torch.bool)
        # It asks of a slot whether its own token is supervised, also where the slot says the next.
        mask = inputs.supervised.roll(-1) if problem.next_token else inputs.supervised
        self.mask, self.tokens = mask[None].long(), inputs.tokens[None]
        self.aux, self.final = inputs.aux[None], inputs.final_hidden[None]
        self.documents = torch.zeros(1, problem.seq, dtype=torch.long)

    def __call__(self) -> Tensor:
        self.backbone.select_anchors = lambda *_: self.anchors
        loss: Tensor = self.model(
            self.aux, self.tokens, self.mask, self.final, self.documents,
            max_anchors=len(self.anchors[0]), gamma=DECAY, **self.options,
        )[1]  # fmt: skip
        return loss


def build(problem: BlockProblem) -> tuple[SpeculatorsStep, list[Tensor]]:
    """Build the forward pass; return it and the tensors at rest."""
    step = SpeculatorsStep(problem)
    inputs = [step.aux, step.final, step.tokens, step.mask]
    return step, [*step.model.parameters(), *step.model.buffers(), *inputs]


def _build_model(problem: BlockProblem, kind: str, core: Any) -> Any:
    """Return the library's draft with the problem's weights and the base's, which are frozen."""
    model: Any = {"dflash": "DFlashDraftModel", "dspark": "DSparkDraftModel"}[kind]
    model = getattr(core, model)(_config(problem, kind)).train()
    load_draft(model, problem, of_base=("embed_tokens.", "lm_head.", "verifier_"))
    inputs = problem.inputs()
    model.embed_tokens.weight.data.copy_(inputs.embedding)
    for head in (model.lm_head, model.verifier_lm_head):
        head.weight.data.copy_(inputs.output_weight)
        head.weight.requires_grad_(False)
    model.embed_tokens.weight.requires_grad_(False)
    model.verifier_norm.weight.data.fill_(1.0)
    return model


def _config(problem: BlockProblem, kind: str) -> Any:
    library: Any = importlib.import_module("speculators")
    module: Any = importlib.import_module(f"speculators.models.{kind}")
    proposals: Any = importlib.import_module("speculators.proposals.greedy")
    name = {"dflash": "DFlash", "dspark": "DSpark"}[kind]
    heads = {"markov_rank": problem.rank, "enable_confidence_head": False}
    return getattr(module, f"{name}SpeculatorConfig")(
        transformer_layer_config=layer_config(problem),
        draft_vocab_size=problem.vocab,
        block_size=problem.block,
        aux_hidden_state_layer_ids=list(range(1, problem.aux + 1)),
        mask_token_id=problem.mask_token,
        sample_from_anchor=problem.next_token,
        **(heads if problem.next_token else {}),
        speculators_config=library.SpeculatorsConfig(
            algorithm=kind,
            proposal_methods=[
                proposals.GreedyTokenProposalConfig(speculative_tokens=problem.judged)
            ],
            default_proposal_method="greedy",
            verifier=library.VerifierConfig(name_or_path=None, architectures=[]),
        ),
    )
