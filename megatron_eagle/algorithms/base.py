"""Algorithm: everything that tells one way of drafting from another, in one object.

The rest of the package asks the object instead of comparing names. It needs neither torch nor
Megatron: what it computes, it computes with the blocks that :class:`DraftBlocks` lists.

Shapes: S' this rank's tokens, B micro-batch, H hidden, A aux layers.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class DraftBlocks(Protocol):
    """Building blocks of a draft that an algorithm combines (megatron_eagle/draft/model.py)."""

    def project(self, features: Tensor) -> Tensor:
        """Norm, if the draft has norms there, and ``fc``: [S', B, A * H] -> [S', B, H]."""
        ...

    def concatenate(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """Put both side by side: [S', B, H] each -> [S', B, 2H]."""
        ...

    def join_by_fc(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """Run ``fc`` on both side by side: [S', B, H] each -> [S', B, H]."""
        ...


UNROLLED: frozenset[str] = frozenset(
    {"ttt_steps", "step_decay", "loss", "attention", "num_experts"}
)
"""Options of every draft that is unrolled step by step, which block drafts do not have."""


@dataclass(frozen=True)
class Schedule[Result]:
    """Two ways to run all steps of a draft; an algorithm chooses one in :meth:`Algorithm.run`.

    ``in_turn``: step t reads the output of step t - 1. ``at_once``: one pass over all steps, the
    later ones from a learned mask hidden state.
    """

    in_turn: Callable[[], Result]
    at_once: Callable[[], Result]


class Algorithm(ABC):
    """A way of drafting. Subclasses set class attributes and override the few methods.

    ``name`` is what ``--eagle-algorithm`` and checkpoints say, ``title`` what people say.
    ``options`` are the options that not every algorithm has and this one has; ``required`` those it
    cannot do without. ``reasons`` says why it lacks an option, for the error line.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    options: ClassVar[frozenset[str]]
    required: ClassVar[frozenset[str]] = frozenset()
    reasons: ClassVar[Mapping[str, str]] = {}

    # What the draft is made of.
    reads_final_hidden: ClassVar[bool] = False
    """Reads the base's final hidden state, and no aux hidden states."""
    joins_by_fc: ClassVar[bool] = False
    """``fc`` is [H, 2H] and runs in every step; the first layer then takes [S', B, H], un-normed.
    Otherwise ``fc`` is [H, A * H] and runs once, and the first layer takes [S', B, 2H]."""
    shares_base_head: ClassVar[bool] = False
    """Has neither a final norm nor a head of its own: the base's frozen output layer reads the
    hidden state."""
    feeds_back_normed: ClassVar[bool] = False
    """The next step reads the last layer's output after the final norm, not before it."""
    norms_each_aux_layer: ClassVar[bool] = False
    """An RMSNorm for each aux layer in front of ``fc``."""
    learns_mask_hidden: ClassVar[bool] = False
    """A learned hidden state stands for the features of tokens that are not drafted yet."""
    regresses_hidden: ClassVar[bool] = False
    """A smooth-L1 loss pulls the draft's hidden state to the base's final one."""

    is_base_module: ClassVar[bool] = False
    """Is a module of the base's own files: one layer of the base's kind, a norm of embedding and
    hidden state each in front of ``fc``, and a final norm (draft/mtp.py)."""

    drafts_blocks: ClassVar[bool] = False
    """Drafts a block of tokens in one pass, beside anchors, and is not unrolled (draft/block.py).
    Shares the base's head even where it has fewer ids, and norms its queries and keys."""
    slot_zero_predicts: ClassVar[bool] = False
    """Slot 0 of a block, the anchor, is judged too: slot k says the token after its own."""

    default_layers: ClassVar[int] = 1
    """Layers of a draft if none are chosen."""

    # What an exported draft must say (megatron_eagle/hf/draft).
    server_method: ClassVar[str] = "eagle3"
    """The method's name in the servers' own flags."""
    parallel_drafting: ClassVar[bool] = False
    """vLLM is told to draft all tokens in one pass."""
    architectures: ClassVar[Mapping[str, str]] = {}
    """Format -> architecture in config.json, where it does not follow from the attention."""
    refusals: ClassVar[Mapping[str, str]] = {}
    """Format or server -> why it cannot run such a draft."""
    served_with_mla: ClassVar[bool] = True
    """Some server reads such a draft with multi-latent attention."""
    zero_fc_bias: ClassVar[frozenset[str]] = frozenset()
    """Formats whose reader wants a bias of ``fc``; it is written as zeros."""

    def start(self, draft: DraftBlocks, features: Tensor) -> Tensor:
        """Return the hidden state [S', B, H] that step 0 reads, from the features [S', B, A * H]
        (or the base's final hidden state [S', B, H])."""
        return draft.project(features)

    def layer_input(self, draft: DraftBlocks, embedding: Tensor, hidden: Tensor) -> Tensor:
        """Return the first layer's input at every step, from [S', B, H] each."""
        return draft.concatenate(embedding, hidden)

    def default_aux_layers(self, base_layers: int) -> tuple[int, ...]:
        """Return the aux layers beside a base of ``base_layers`` layers if none are chosen; empty
        if the formula, :attr:`aux_formula`, does not suit so few."""
        if base_layers < 7:
            return ()
        return (1, base_layers // 2 - 1, base_layers - 4)

    aux_formula: ClassVar[str] = "1, n//2 - 1 and n - 4 need at least 7"
    """What :meth:`default_aux_layers` needs, for the error line."""

    def run[Result](self, schedule: Schedule[Result]) -> Result:
        """Run all steps in the way that suits this algorithm."""
        return schedule.in_turn()
