"""diffusers: block-sparse attention as an attention backend, for models that foveal has no family for.

A backend of diffusers sees query, key, and value, and nothing of the video. `foveal.sparsify` knows the grid, protects
text, trains, and saves; this neither needs to know the model nor changes it.
"""

from __future__ import annotations

import functools
from enum import Enum
from typing import Any

from torch import Tensor

from foveal.checks import check_choice
from foveal.hosts.patching import Patch, import_host
from foveal.kernels.api import IMPLS
from foveal.methods.sla.attention import sla_attention
from foveal.methods.sla.config import SLAConfig, check_bare

NAME = "foveal"
HOW_TO_INSTALL = "pip install diffusers"


def register_attention_backend(config: SLAConfig, *, impl: str = "auto") -> Patch:
    """Make `model.set_attention_backend("foveal")` run block-sparse attention in every self-attention.

    Attention with a mask or causal attention, and attention over another number of keys than there are queries, stays
    diffusers' native one. Text that is part of a self-attention is treated as video.

    Args:
        config: which blocks. It must have no linear branch and no projection, and raster order, for a backend has
            neither parameters nor a grid: `SLAConfig(keep_ratio=..., drop_ratio=0, linear_scope="none",
            projection=False)`.
        impl: see `block_sparse_attention`.

    Returns:
        A `Patch`. `undo()`, or the end of a `with` block, takes the name out of diffusers again. Reset the models that
        use it before, with `model.reset_attention_backend()`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; or the name is taken.
        ImportError: diffusers is absent, or has another registry than foveal knows.
    """
    check_bare(config)
    check_choice("impl", impl, IMPLS)
    dispatch = import_host("diffusers.models.attention_dispatch", "diffusers", HOW_TO_INSTALL)
    names, registry = _parts(dispatch)
    if NAME in names._value2member_map_:
        raise ValueError(f"diffusers has an attention backend {NAME!r} already: undo that registration first")
    native, former = registry._backends[names.NATIVE], registry.get_active_backend()[0]
    member = _add_member(names)
    registry.register(member)(_backend(native, config, impl))

    def take_out() -> None:
        if registry.get_active_backend()[0] is member:
            registry.set_active_backend(former)
        for table in (registry._backends, registry._constraints, registry._supported_arg_names):
            del table[member]
        _remove_member(names, member)

    return Patch([], also=take_out)


def _parts(dispatch: Any) -> tuple[Any, Any]:
    """diffusers' names of backends, and its registry."""
    names, registry = (getattr(dispatch, name, None) for name in ("AttentionBackendName", "_AttentionBackendRegistry"))
    if names is None or registry is None or not hasattr(registry, "_supported_arg_names"):
        raise ImportError("diffusers has another registry of attention backends than foveal knows, that of 0.42")
    return names, registry


def _backend(native: Any, config: SLAConfig, impl: str) -> Any:
    """The function that diffusers calls with [B, L, H, D] tensors. Its parameters are those of the native one."""

    @functools.wraps(native)
    def attention(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        dense = kwargs.get("attn_mask") is not None or kwargs.get("is_causal") or kwargs.get("dropout_p")
        if dense or query.shape != key.shape or kwargs.get("_parallel_config") is not None:
            return native(query, key, value, **kwargs)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return sla_attention(query, key, value, config=config, scale=kwargs.get("scale"), impl=impl).transpose(1, 2)

    return attention


def _add_member(names: Any) -> Any:
    """A further member of diffusers' enumeration: `set_attention_backend` takes no other names."""
    member = str.__new__(names, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = names._value2member_map_[NAME] = member
    return member


def _remove_member(names: Any, member: Enum) -> None:
    names._member_names_.remove(member._name_)
    del names._member_map_[member._name_], names._value2member_map_[NAME]
