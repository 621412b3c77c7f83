"""Where Megatron runs: on CUDA as it is, on a CPU after :func:`megatron_eagle.platform.enable`."""

from __future__ import annotations

from megatron_eagle.platform.cpu import enable, is_enabled, recommended_environment

__all__ = ["enable", "is_enabled", "recommended_environment"]
