"""Every option of a draft and of its training."""

from megatron_eagle.config.eagle_config import EagleConfig

__all__ = ["EagleConfig"]
