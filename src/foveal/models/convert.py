"""`sparsify`, `densify` and `dense`: sparse attention in the place of a model's self-attention, and back.

Each converted layer gets a `SparseAttentionProcessor`, a module that owns the method's parameters and keeps the
processor that it stands in for. All of a transformer's processors share one `ForwardState`, whose hooks on the
transformer and its blocks tell each forward its grid and what is dense in it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from foveal.methods.base import Config
from foveal.methods.default import DEFAULT
from foveal.models.families.table import components_of, family_of
from foveal.models.files.manifest import check_component
from foveal.models.files.policy_file import read_policy
from foveal.models.installation import build_processors, install, uninstall
from foveal.models.layers import Layers, choose_configs
from foveal.models.policy import Policy, attach_policy, check_policy, check_schedule, set_policy
from foveal.models.pretrained import become_dense, become_sparse, register_components
from foveal.models.processor import SparseAttentionProcessor, sparse_processors, state_of
from foveal.models.state import dense_forwards

Model = TypeVar("Model")


def sparsify(
    model: Model,
    config: Config | None = None,
    *,
    layers: Layers = None,
    policy: Policy | str | os.PathLike[str] | None = None,
    impl: str = "auto",
    on_fallback: str = "allow",
) -> Model:
    """Puts sparse attention in the place of a model's dense self-attention. Cross-attention stays as it is.

    The new parameters go where the layer's are, in the model's dtype, but for SLA's projection, which stays float32.
    They start at values that leave the sparse branch alone (see `SparseLinearAttention`, `VideoSparseAttention`).

    Args:
        model: a transformer of a family in the table, or a pipeline, whose `transformer` and `transformer_2` are
            converted in the same way.
        config: of any method. Without one, and without `layers` that have configurations of their own, it is what
            lost least in docs/evidence.md: `VSAConfig(keep_ratio=0.125, router="per_head")`.
        layers: which layers, by index or by name ("blocks.0.attn1"). None converts all of them. A collection, [0, 5]
            or range(2, 28), converts these. A table, {0: None, range(1, 4): one, "blocks.7.attn1": another}, gives
            these layers configurations of their own, None for dense, and the others `config`; without a `config` the
            others stay as they are. A function (index, name) gives every layer its configuration or None; `config`
            must then be None. Calls add up, and none converts a layer again; `reconfigure` changes one.
        policy: when the layers run dense and how much they keep, a `Policy` (see `set_policy`); or a file that `foveal
            calibrate` wrote, which gives every layer its configuration too; `config` and `layers` must then be None.
        impl: see `block_sparse_attention`.
        on_fallback: what happens at the end of a forward in which a layer fell back: to a slower implementation, wholly
            or in a part; to dense attention by a policy; or to as much work, where what it keeps covers all blocks.
            "allow" only records it for `report`, "warn" also warns once for each kind of forward, and "raise" raises a
            RuntimeError. An `impl` that you name is no fallback, and neither is `dense`. It is not saved;
            `set_on_fallback` changes it.

    Returns:
        The same model, changed in place; unchanged if anything below is raised.

    Raises:
        TypeError: an unsupported model, or a `config`, `layers` or `policy` of the wrong type.
        FileNotFoundError: no such policy file.
        ValueError: a layer that does not exist, is named twice in a table, is sparse already, or has a processor of
            someone else's; `layers` that leave nothing to convert; a model under context parallelism that sparse
            layers cannot follow, or sharded; a policy or policy file that does not go with the model; an unknown `impl`
            or `on_fallback`.
    """
    if policy is not None and not isinstance(policy, Policy):
        if config is not None or layers is not None:
            raise ValueError("a policy file has the configuration of every layer: give config and layers, or the file")
        return _follow_file(model, policy, impl=impl, on_fallback=on_fallback)
    if config is None and not callable(layers) and not isinstance(layers, Mapping):
        config = DEFAULT
    if policy is not None:
        check_schedule(policy, None if isinstance(model, nn.Module) else model)
    plans = []
    for transformer in components_of(model).values():
        configs = choose_configs(family_of(transformer).self_attention_layers(transformer), config, layers)
        plans.append((transformer, build_processors(transformer, configs, impl=impl, on_fallback=on_fallback)))
        if policy is not None:
            now = {name: processor.config for name, processor in sparse_processors(transformer).items()}
            check_policy(transformer, policy, now | configs)
    _install_all(model, plans)
    return model if policy is None else set_policy(model, policy)


def _install_all(model: Any, plans: list[tuple[nn.Module, dict[str, SparseAttentionProcessor]]]) -> None:
    for transformer, processors in plans:
        install(transformer, processors)
        become_sparse(transformer)
    register_components(model)


def _follow_file(model: Model, path: str | os.PathLike[str], *, impl: str, on_fallback: str) -> Model:
    """`sparsify` by a policy file."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"policy must be a Policy or a policy file, got {path!r} ({type(path).__name__})")
    found, transformers = read_policy(path), components_of(model)
    if not set(found) <= set(transformers):
        raise ValueError(
            f"policy file {path} is for {' and '.join(found)}, but the model has {' and '.join(transformers)}"
        )
    plans = []
    for name, component in found.items():
        transformer = transformers[name]
        if sparse_processors(transformer):
            raise ValueError(f"{name} is sparse already; densify the model to follow policy file {path}")
        check_component(f"{path}: {name}", transformer, component.family, component.layers, component.policy)
        options = {"impl": impl, "on_fallback": on_fallback}
        plans.append((transformer, build_processors(transformer, component.layers, **options)))
    _install_all(model, plans)
    pipeline = None if isinstance(model, nn.Module) else model
    for name, component in found.items():
        attach_policy(transformers[name], component.policy, pipeline=pipeline)
    return model


def densify(model: Model) -> Model:
    """Undoes `sparsify`: the original processors come back, the hook and the new parameters go.

    Args:
        model: what `sparsify` takes. One that is dense already stays as it is.

    Returns:
        The same model, changed in place.
    """
    for transformer in components_of(model).values():
        uninstall(transformer)
        become_dense(transformer)
    register_components(model)
    return model


@contextlib.contextmanager
def dense(model: Model) -> Iterator[Model]:
    """`with dense(model): ...` runs dense attention inside; the sparse parameters stay where they are.

    It holds for the forwards of this thread, or of this task of `asyncio`, and not for those of others, nor for copies
    of the model. It may be nested, and ends with the block however that ends. With gradient checkpointing, a forward
    made inside is recomputed dense even if its backward runs outside.

    Args:
        model: what `sparsify` takes. One that is dense already stays so.
    """
    states = [state_of(transformer) for transformer in components_of(model).values()]
    with dense_forwards([state for state in states if state is not None]):
        yield model
