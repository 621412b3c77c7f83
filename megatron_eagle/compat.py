"""Import Megatron names that move between releases, and patch Megatron: both are done here only.

The rest of the package takes such names from here, so a Megatron release that moves one is a
one-line change, and its symptom is an error that spells out the path that was expected.

A path is written ``"package.module:Attribute"`` or ``"package.module:Class.method"``.
"""

# ruff: noqa: F401 - the imports for type checkers are what other modules import from here

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_eagle.megatron_import import import_megatron

if TYPE_CHECKING:
    from megatron.core import dist_checkpointing
    from megatron.core.activations import quick_gelu
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedTensor,
        ShardedTensorFactory,
        apply_factories,
    )
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.models.hybrid.hybrid_block import HybridStack
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.pipeline_parallel.schedules import backward_step, forward_step
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.multi_latent_attention import (
        MLASelfAttention,
        MultiLatentAttention,
    )
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.utils import (
        ensure_metadata_has_dp_cp_group,
        is_layer_window_attention,
        make_sharded_tensors_for_checkpoint,
    )
    from megatron.core.utils import (
        configure_nvtx_profiling,
        get_model_config,
        make_tp_sharded_tensor_for_checkpoint,
        nvtx_range_pop,
        nvtx_range_push,
        unwrap_model,
    )
    from megatron.training.argument_utils import (
        core_transformer_config_from_args,
        gpt_config_from_args,
        hybrid_config_from_args,
    )
    from megatron.training.arguments import add_megatron_arguments
    from megatron.training.models import GPTModelBuilder, HybridModelBuilder

logger = logging.getLogger("megatron_eagle")

TESTED_MEGATRON = "0.19.2"

_MARKER = "_megatron_eagle_patches"

_PATHS = {
    "ColumnParallelLinear": "megatron.core.tensor_parallel:ColumnParallelLinear",
    "GPTModel": "megatron.core.models.gpt:GPTModel",
    "GPTModelBuilder": "megatron.training.models:GPTModelBuilder",
    "GatedDeltaNet": "megatron.core.ssm.gated_delta_net:GatedDeltaNet",
    "HybridModelBuilder": "megatron.training.models:HybridModelBuilder",
    "HybridStack": "megatron.core.models.hybrid.hybrid_block:HybridStack",
    "RowParallelLinear": "megatron.core.tensor_parallel:RowParallelLinear",
    "hybrid_config_from_args": "megatron.training.argument_utils:hybrid_config_from_args",
    "hybrid_stack_spec": "megatron.core.models.hybrid.hybrid_layer_specs:hybrid_stack_spec",
    "IdentityOp": "megatron.core.transformer.identity_op:IdentityOp",
    "MLP": "megatron.core.transformer.mlp:MLP",
    "LocalSpecProvider": "megatron.core.models.backends:LocalSpecProvider",
    "MLASelfAttention": "megatron.core.transformer.multi_latent_attention:MLASelfAttention",
    "ModelParallelConfig": "megatron.core.model_parallel_config:ModelParallelConfig",
    "MultiLatentAttention": (
        "megatron.core.transformer.multi_latent_attention:MultiLatentAttention"
    ),
    "MegatronModule": "megatron.core.transformer.module:MegatronModule",
    "RotaryEmbedding": (
        "megatron.core.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding"
    ),
    "SelfAttention": "megatron.core.transformer.attention:SelfAttention",
    "ShardedTensor": "megatron.core.dist_checkpointing.mapping:ShardedTensor",
    "ShardedTensorFactory": "megatron.core.dist_checkpointing.mapping:ShardedTensorFactory",
    "StrictHandling": "megatron.core.dist_checkpointing.validation:StrictHandling",
    "TopKRouter": "megatron.core.transformer.moe.router:TopKRouter",
    "MLATransformerConfig": "megatron.core.transformer:MLATransformerConfig",
    "TransformerConfig": "megatron.core.transformer:TransformerConfig",
    "WrappedTorchNorm": "megatron.core.transformer.torch_norm:WrappedTorchNorm",
    "add_megatron_arguments": "megatron.training.arguments:add_megatron_arguments",
    "apply_rotary_pos_emb": (
        "megatron.core.models.common.embeddings.rope_utils:apply_rotary_pos_emb"
    ),
    "apply_factories": "megatron.core.dist_checkpointing.mapping:apply_factories",
    "backward_step": "megatron.core.pipeline_parallel.schedules:backward_step",
    "build_module": "megatron.core.transformer.spec_utils:build_module",
    "configure_nvtx_profiling": "megatron.core.utils:configure_nvtx_profiling",
    "copy_to_tensor_model_parallel_region": (
        "megatron.core.tensor_parallel.mappings:copy_to_tensor_model_parallel_region"
    ),
    "core_transformer_config_from_args": (
        "megatron.training.argument_utils:core_transformer_config_from_args"
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
    "gpt_config_from_args": "megatron.training.argument_utils:gpt_config_from_args",
    "is_layer_window_attention": "megatron.core.transformer.utils:is_layer_window_attention",
    "make_sharded_tensors_for_checkpoint": (
        "megatron.core.transformer.utils:make_sharded_tensors_for_checkpoint"
    ),
    "make_tp_sharded_tensor_for_checkpoint": (
        "megatron.core.utils:make_tp_sharded_tensor_for_checkpoint"
    ),
    "nested_values": "megatron.core.dist_checkpointing.dict_utils:nested_values",
    "nvtx_range_pop": "megatron.core.utils:nvtx_range_pop",
    "nvtx_range_push": "megatron.core.utils:nvtx_range_push",
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

if not TYPE_CHECKING:  # a type checker and an editor see the imports above, and no other name

    def __getattr__(name: str) -> Any:
        """Import a name of ``_PATHS`` when it is first asked for."""
        if name not in _PATHS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return require(_PATHS[name])


class MovedSymbolError(ImportError):
    """A name that is not where this package expects it in Megatron or PyTorch."""


def installed_megatron() -> str:
    """Return the installed megatron-core version, or ``"not installed"``."""
    try:
        return version("megatron-core")
    except PackageNotFoundError:
        return "not installed"


def require(path: str) -> Any:
    """Return the object at ``path``.

    Raises:
        MovedSymbolError: the module or a name inside it does not exist; the message holds the exact
            path, and the installed and the tested megatron-core versions.
    """
    owner, name = _owner(path)
    return getattr(owner, name)


class Patch(NamedTuple):
    """One replacement that an object stands for: why it was made, and the object before it."""

    why: str
    original: Any


def patches_of(value: Any) -> tuple[Patch, ...]:
    """Return the patches of this package that ``value`` carries, oldest first."""
    return getattr(value, _MARKER, ())


def patch(path: str, value: Any, why: str) -> None:
    """Put ``value``, often a wrapper of ``require(path)``, in the place of the object at ``path``.

    The new object carries a marker (``patches_of``) with the reason ``why``. An object that already
    carries one with the same reason is left alone, so patching twice is the same as patching once.
    Every patch that is made gives one line of the logger ``megatron_eagle``: at level INFO on the
    first rank, DEBUG on the others.

    Raises:
        MovedSymbolError: as ``require`` does.
    """
    patch_all({path: value}, why)


def patch_all(replacements: Mapping[str, Any], why: str) -> None:
    """Put each value of ``replacements`` in the place of the object at the path that is its key.

    This is ``patch`` for several objects with one reason and one log line. Numbers and booleans
    cannot carry a marker: they are set where they differ.
    """
    patched = [path for path, value in replacements.items() if _install(path, value, why)]
    if patched:
        level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.DEBUG
        logger.log(level, "patched %s: %s", ", ".join(patched), why)


def _install(path: str, value: Any, why: str) -> bool:
    """Set the object at ``path`` to ``value``, unless that was done before."""
    owner, name = _owner(path)
    original = getattr(owner, name)
    earlier = patches_of(original)
    if any(made.why == why for made in earlier) or (isinstance(value, int) and value == original):
        return False
    setattr(owner, name, value)
    if not isinstance(value, int):
        # Read back: of a static method, the function is what others get and what can be marked.
        setattr(getattr(owner, name), _MARKER, (*earlier, Patch(why, original)))
    return True


def _owner(path: str) -> tuple[Any, str]:
    """Return the module or class that has the last name of ``path`` as an attribute, and the name.

    Raises:
        MovedSymbolError: as ``require`` does.
    """
    module_name, _, attributes = path.partition(":")
    assert attributes, f"{path!r} must look like 'package.module:Name'"
    *parents, name = attributes.split(".")
    try:
        owner: Any = import_megatron(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a dependency of that module is missing, not the module
        raise _moved(path) from error
    for parent in parents:
        if not hasattr(owner, parent):
            raise _moved(path)
        owner = getattr(owner, parent)
    if not hasattr(owner, name):
        raise _moved(path)
    return owner, name


def _moved(path: str) -> MovedSymbolError:
    return MovedSymbolError(
        f"{path} does not exist in the installed megatron-core {installed_megatron()} "
        f"(megatron_eagle is tested with {TESTED_MEGATRON})"
    )
