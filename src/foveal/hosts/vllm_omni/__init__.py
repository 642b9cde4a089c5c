"""vLLM-Omni: foveal in its slot FASTVIDEO_VSA, for its Wan and MiniMax-H3 models, and as a kernel of its SPARSE_ATTN.

vLLM-Omni calls `register`, through an entry point, in each of its processes. Nothing else here loads it.
"""

from __future__ import annotations

import contextlib
import warnings
from types import ModuleType
from typing import Any

from foveal.hosts.patching import Patch, import_host

HOW_TO_INSTALL = "pip install vllm-omni"
BACKENDS = "foveal.hosts.vllm_omni.backend"
ATTENTION = "vllm_omni.diffusion.attention"
H3 = "vllm_omni.diffusion.models.minimax_h3"


def register() -> None:
    """Run foveal in the slot FASTVIDEO_VSA from now on: the entry point in `vllm_omni.general_plugins`.

    vLLM-Omni may call it more than once in a process. Where its slot is not the one that foveal knows, this warns and
    leaves the host as it is, for the host would not survive an error here.
    """
    try:
        slot = vsa_slot()
        if not is_ours(slot.get_path()):
            patch("auto")
    except ImportError as error:
        warnings.warn(f"foveal does not run in this vLLM-Omni: {error}", stacklevel=2)


def patch(impl: str) -> Patch:
    """The slot FASTVIDEO_VSA run by `impl`, in models that are built from now on."""
    registry = import_part(f"{ATTENTION}.backends.registry")
    selector, slot = import_part(f"{ATTENTION}.selector"), vsa_slot()
    former = slot.get_path() if slot.is_overridden() else None
    if is_ours(slot.get_path()):
        raise ValueError("host 'vllm_omni' is patched already: undo that patch first")
    from foveal.hosts.vllm_omni.backend import backend_class

    backend = backend_class(impl)
    replacements = []
    # MiniMax-H3 puts a class of its own in the place of the slot's, by this name. Where its package does not load, the
    # host cannot run the model either.
    with contextlib.suppress(ImportError):
        replacements.append((import_part(f"{H3}.attention.fastvideo_h3"), "MiniMaxH3VSAImpl", backend.get_impl_cls()))

    def give_back() -> None:
        slot.clear_override()
        if former is not None:
            registry.register_diffusion_backend(slot, former)
        selector._cached_get_backend_cls.cache_clear()

    patched = Patch(replacements, also=give_back)
    registry.register_diffusion_backend(slot, f"{BACKENDS}.{backend.__name__}")
    # It remembers the class of a slot that it has asked for.
    selector._cached_get_backend_cls.cache_clear()
    return patched


def import_part(module: str) -> ModuleType:
    """A module of the host; an ImportError that says what is missing."""
    return import_host(module, "vLLM-Omni", HOW_TO_INSTALL)


def vsa_slot() -> Any:
    """The host's slot for VSA; an ImportError if it has none."""
    slot = getattr(import_part(f"{ATTENTION}.backends.registry").DiffusionAttentionBackendEnum, "FASTVIDEO_VSA", None)
    if slot is None:
        raise ImportError("vLLM-Omni has no attention backend FASTVIDEO_VSA; foveal knows the one of 0.30")
    return slot


def is_ours(path: str) -> bool:
    """Whether the path of a backend's class is foveal's."""
    return path.startswith(f"{BACKENDS}.")
