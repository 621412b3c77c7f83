"""megatron_eagle: train EAGLE-3 speculative-decoding drafts inside Megatron's trainer.

Shape letters in names and docstrings, Megatron's order [S, B, H]:

    S   sequence length                     V, Vp  base vocabulary, this rank's shard
    S'  S, or S / TP under sequence         D, Dp  draft vocabulary, this rank's shard
        parallelism                         A      captured base layers
    B   micro-batch size                    K      test-time-training (TTT) steps
    H   hidden size                         M      supervised target positions of a micro-batch

Importing this package imports neither torch nor Megatron. Reading order: ``objective/unroll.py``,
``training/model.py``, ``parallel/soft_cross_entropy.py``, ``teacher/targets.py``,
``attention/trunk_branch.py``, ``draft/layer.py``.
"""

from megatron_eagle.config import EagleConfig

__all__ = ["EagleConfig"]
__version__ = "0.1.0"
