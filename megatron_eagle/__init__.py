"""megatron_eagle: train EAGLE speculative-decoding drafts inside Megatron's trainer.

``megatron_eagle.attach`` puts a draft beside a model in a trainer of your own. Importing this
package imports neither torch nor Megatron; asking for ``attach`` does. Start reading at
``model.py``: its ``forward`` is one training step. Then ``objective/unroll.py`` (its K steps),
``loss/soft_cross_entropy.py``, ``teacher/targets.py``, ``attention/trunk_branch.py`` and
``draft/layer.py``.

Shapes are in Megatron's order [S, B, H]. A module that uses shape letters explains them in its
docstring; the usual ones are S sequence, S' this rank's part of it, B micro-batch, H hidden, V and
Vp base vocabulary and this rank's shard, D and Dp draft vocabulary and this rank's shard, A aux
layers, K TTT steps, M supervised target positions.
"""

from typing import TYPE_CHECKING, Any

from megatron_eagle.config import DraftSpec, EagleConfig, TrainOptions

if TYPE_CHECKING:
    from megatron_eagle.attached.attach import attach

__all__ = ["DraftSpec", "EagleConfig", "TrainOptions", "attach"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import ``attach``, and torch and Megatron with it, when it is first asked for."""
    if name != "attach":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_eagle.attached.attach import attach

    return attach
