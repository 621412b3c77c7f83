"""megatron_eagle: train EAGLE speculative-decoding drafts inside Megatron's trainer.

Importing this package imports neither torch nor Megatron. Start reading at ``model.py``: its
``forward`` is one training step. Then ``objective/unroll.py`` (its K steps),
``loss/soft_cross_entropy.py``, ``teacher/targets.py``, ``attention/trunk_branch.py`` and
``draft/layer.py``.

Shapes are in Megatron's order [S, B, H]. A module that uses shape letters explains them in its
docstring; the usual ones are S sequence, S' this rank's part of it, B micro-batch, H hidden, V and
Vp base vocabulary and this rank's shard, D and Dp draft vocabulary and this rank's shard, A aux
layers, K TTT steps, M supervised target positions.
"""

from megatron_eagle.config import DraftSpec, EagleConfig, TrainOptions

__all__ = ["DraftSpec", "EagleConfig", "TrainOptions"]
__version__ = "0.1.0"
