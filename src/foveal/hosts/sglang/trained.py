"""What foveal trained in a MiniMax-H3, for SGLang's layers: whether they have a coarse branch, and their routers.

A server names the folder: `--attention-backend-config "VSA_sparsity=0.95,foveal_parameters=FOLDER"`. FOLDER is what
`foveal.save` wrote, or the `export/sparse` of `foveal train`. How many cubes are kept, and in which steps and layers,
stays the server's to say.
"""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from foveal.methods.base import method_of
from foveal.methods.vsa.config import VSAConfig
from foveal.models.files.parts import read_saved_parameters

SETTING = "foveal_parameters"
VSA = method_of(VSAConfig())
ROUTER = ("router.proj_query", "router.proj_key")
Projections = tuple[Tensor | None, Tensor | None]


class TrainedLayer(NamedTuple):
    """A layer's configuration, None for a dense one, and its router's projections, [D, D] or [H, D, D]."""

    config: VSAConfig | None
    projections: Projections

    def of(self, query: Tensor) -> Projections:
        """The projections of the heads of query [T, H, D], which may be some of the layer's, on its device."""
        known = (x for x in self.projections if x is not None)
        found = [_on(x, query.device)[_heads_of(x, query.shape[1])] for x in known]
        return tuple(found) if found else (None, None)


def trained_layers() -> tuple[TrainedLayer, ...] | None:
    """The layers by their index, as this process's server was told; None if it was not."""
    args = importlib.import_module("sglang.multimodal_gen.runtime.server_args")
    try:
        settings = args.get_global_server_args().attention_backend_config
    except ValueError:  # no server, as in SGLang's own unit tests
        return None
    folder = (settings or {}).get(SETTING)
    return None if folder is None else read_layers(str(folder))


@functools.lru_cache(maxsize=4)
def read_layers(folder: str) -> tuple[TrainedLayer, ...]:
    """The layers that a folder has parameters for.

    Raises:
        FileNotFoundError, ValueError: as `read_saved_parameters` does; for layers of another method than VSA, whose
            choice SGLang does not have either, and for a policy, which is SGLang's to say.
    """
    saved, policy = read_saved_parameters(folder)
    if saved.family != "minimax_h3":
        raise ValueError(f"{folder} is for models of family {saved.family}, expected minimax_h3")
    if policy is not None:
        raise ValueError(
            f"{folder} has a policy, which SGLang does not follow: save without one, and give dense steps and layers "
            "to SGLang, as vsa_dense_first_n_steps and vsa_dense_layers of --attention-backend-config"
        )
    layers = []
    for config, tensors in zip(saved.configs, saved.layers, strict=True):
        if config is not None and method_of(config) is not VSA:
            raise ValueError(f"{folder} must hold parameters of VSA, got {type(config).__name__}")
        if config is not None and (config.fine_gate or not config.ranks_means or config.keep_mass is not None):
            raise ValueError(f"SGLang has no fine gate, other scores, or budget by mass, but {folder} has {config}")
        layers.append(TrainedLayer(config, tuple(tensors.get(name) for name in ROUTER)))
    return tuple(layers)


@functools.lru_cache(maxsize=256)
def _on(x: Tensor, device: torch.device) -> Tensor:
    """The same tensor of a file on a device, in float32."""
    return x.to(device, torch.float32)


def _heads_of(projection: Tensor, heads: int) -> slice:
    """Where the heads of a call are among a projection's; all of it if they share it.

    Raises:
        ValueError: the numbers of heads do not fit together.
    """
    if projection.dim() == 2 or len(projection) == heads:
        return slice(None)
    state = importlib.import_module("sglang.multimodal_gen.runtime.distributed.parallel_state")
    tensor, ulysses = state.get_tp_world_size(), state.get_ulysses_parallel_world_size()
    if heads * tensor * ulysses != len(projection):
        where = f"{heads} on each of {tensor * ulysses} GPUs"
        raise ValueError(f"{SETTING} has routers of {len(projection)} heads, but a layer has {where}")
    first = (state.get_tp_rank() * ulysses + state.get_ulysses_parallel_rank()) * heads
    return slice(first, first + heads)
