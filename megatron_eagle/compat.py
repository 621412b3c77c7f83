"""The one file that imports Megatron names which move between releases.

The rest of the package takes such names from here, so a Megatron release that moves one is a
one-line change, and its symptom is an error that spells out the path that was expected.

A path is written ``"package.module:Attribute"`` or ``"package.module:Class.method"``.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

TESTED_MEGATRON = "0.19.2"

_PATHS = {
    "ColumnParallelLinear": "megatron.core.tensor_parallel:ColumnParallelLinear",
    "GPTModel": "megatron.core.models.gpt:GPTModel",
    "IdentityOp": "megatron.core.transformer.identity_op:IdentityOp",
    "MLP": "megatron.core.transformer.mlp:MLP",
    "LocalSpecProvider": "megatron.core.models.backends:LocalSpecProvider",
    "MLASelfAttention": "megatron.core.transformer.multi_latent_attention:MLASelfAttention",
    "MultiLatentAttention": (
        "megatron.core.transformer.multi_latent_attention:MultiLatentAttention"
    ),
    "MegatronModule": "megatron.core.transformer.module:MegatronModule",
    "RotaryEmbedding": (
        "megatron.core.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding"
    ),
    "ShardedTensor": "megatron.core.dist_checkpointing.mapping:ShardedTensor",
    "StrictHandling": "megatron.core.dist_checkpointing.validation:StrictHandling",
    "TopKRouter": "megatron.core.transformer.moe.router:TopKRouter",
    "MLATransformerConfig": "megatron.core.transformer:MLATransformerConfig",
    "TransformerConfig": "megatron.core.transformer:TransformerConfig",
    "apply_factories": "megatron.core.dist_checkpointing.mapping:apply_factories",
    "backward_step": "megatron.core.pipeline_parallel.schedules:backward_step",
    "build_module": "megatron.core.transformer.spec_utils:build_module",
    "copy_to_tensor_model_parallel_region": (
        "megatron.core.tensor_parallel.mappings:copy_to_tensor_model_parallel_region"
    ),
    "dist_checkpointing": "megatron.core:dist_checkpointing",
    "ensure_metadata_has_dp_cp_group": (
        "megatron.core.transformer.utils:ensure_metadata_has_dp_cp_group"
    ),
    "finalize_model_grads": "megatron.core.distributed:finalize_model_grads",
    "forward_step": "megatron.core.pipeline_parallel.schedules:forward_step",
    "gather_from_sequence_parallel_region": (
        "megatron.core.tensor_parallel.mappings:gather_from_sequence_parallel_region"
    ),
    "gather_from_tensor_model_parallel_region": (
        "megatron.core.tensor_parallel.mappings:gather_from_tensor_model_parallel_region"
    ),
    "get_cuda_rng_tracker": "megatron.core.tensor_parallel.random:get_cuda_rng_tracker",
    "get_gpt_decoder_block_spec": (
        "megatron.core.models.gpt.gpt_layer_specs:get_gpt_decoder_block_spec"
    ),
    "get_gpt_layer_local_spec": (
        "megatron.core.models.gpt.gpt_layer_specs:get_gpt_layer_local_spec"
    ),
    "get_gpt_layer_with_transformer_engine_spec": (
        "megatron.core.models.gpt.gpt_layer_specs:get_gpt_layer_with_transformer_engine_spec"
    ),
    "get_model_config": "megatron.core.utils:get_model_config",
    "is_layer_window_attention": "megatron.core.transformer.utils:is_layer_window_attention",
    "make_sharded_tensors_for_checkpoint": (
        "megatron.core.transformer.utils:make_sharded_tensors_for_checkpoint"
    ),
    "make_tp_sharded_tensor_for_checkpoint": (
        "megatron.core.utils:make_tp_sharded_tensor_for_checkpoint"
    ),
    "nested_values": "megatron.core.dist_checkpointing.dict_utils:nested_values",
    "quick_gelu": "megatron.core.activations:quick_gelu",
    "reduce_from_tensor_model_parallel_region": (
        "megatron.core.tensor_parallel.mappings:reduce_from_tensor_model_parallel_region"
    ),
    "reduce_scatter_to_sequence_parallel_region": (
        "megatron.core.tensor_parallel.mappings:reduce_scatter_to_sequence_parallel_region"
    ),
    "set_tensor_model_parallel_attributes": (
        "megatron.core.tensor_parallel.layers:set_tensor_model_parallel_attributes"
    ),
    "unwrap_model": "megatron.core.utils:unwrap_model",
}


def __getattr__(name: str) -> Any:
    """Names of ``_PATHS``, imported when first asked for: Megatron itself must be imported only
    after :func:`megatron_eagle.platform.enable`."""
    if name not in _PATHS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return require(_PATHS[name])


class MovedSymbolError(ImportError):
    """Megatron no longer has a name where this package expects it."""


def installed_megatron() -> str:
    """The installed megatron-core version, or ``"not installed"``."""
    try:
        return version("megatron-core")
    except PackageNotFoundError:
        return "not installed"


def require(path: str) -> Any:
    """Return the object at ``path``.

    Raises:
        MovedSymbolError: the module or a name inside it is not there; the message holds the exact
            path, and the installed and the tested megatron-core versions.
    """
    owner, name = _owner(path)
    if not hasattr(owner, name):
        raise _moved(path)
    return getattr(owner, name)


def replace(path: str, value: Any) -> None:
    """Set the existing attribute at ``path`` to ``value``; raises like :func:`require`."""
    owner, name = _owner(path)
    if not hasattr(owner, name):
        raise _moved(path)
    setattr(owner, name, value)


def _owner(path: str) -> tuple[Any, str]:
    module_name, _, attributes = path.partition(":")
    assert attributes, f"{path!r} must look like 'package.module:Name'"
    *parents, name = attributes.split(".")
    try:
        owner: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a dependency of that module is missing, not the module
        raise _moved(path) from error
    for parent in parents:
        if not hasattr(owner, parent):
            raise _moved(path)
        owner = getattr(owner, parent)
    return owner, name


def _moved(path: str) -> MovedSymbolError:
    return MovedSymbolError(
        f"{path} does not exist in the installed megatron-core {installed_megatron()} "
        f"(megatron_eagle is tested with {TESTED_MEGATRON})"
    )
