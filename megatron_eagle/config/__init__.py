"""Every option of a draft (DraftSpec) and of its training (TrainOptions)."""

from megatron_eagle.config.eagle_config import EagleConfig
from megatron_eagle.config.spec import DraftSpec
from megatron_eagle.config.train_options import TrainOptions

__all__ = ["DraftSpec", "EagleConfig", "TrainOptions"]
