"""`save_pretrained` and `from_pretrained` of diffusers, for models with sparse layers.

diffusers builds a model from its class and `config.json`, and knows that class by the module that it comes from. So
`sparsify` gives a transformer a subclass of its own class, of the same name, whose module is `foveal.models`. Its
`config.json` says which layers are sparse and how, and its `from_pretrained` builds them before the weights are read.
A pipeline's `model_index.json` then names ["foveal.models", "WanTransformer3DModel"].
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from foveal.models.families.table import FAMILIES, components_of
from foveal.models.files.manifest import build_described, describe
from foveal.models.processor import sparse_processors, state_of
from foveal.models.schedules import say_step

MODULE = "foveal.models"
CONFIG_KEY = "foveal"

# Part of the names of the parameters that `sparsify` adds, and of no others.
PROCESSOR = "processor"


class SparseModelMixin:
    """What a transformer's class does besides, so that diffusers keeps its sparse layers."""

    def to_json_string(self) -> str:
        """The text of `config.json`."""
        fields = json.loads(super().to_json_string())
        fields.pop(CONFIG_KEY, None)
        description = describe(self)
        if description is not None:
            fields[CONFIG_KEY] = description
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers does, with the sparse layers of `config`, their parameters at their start.

        Raises:
            ValueError: sparse layers that this model does not have, or written by another version.
        """
        config = dict(config)
        description = config.pop(CONFIG_KEY, None)
        model, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        if description is not None:
            build_described(model, description)
        return (model, unused) if return_unused_kwargs else model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers does, with the sparse layers that were saved.

        Raises:
            ValueError: a sparse parameter that is not in the file.
        """
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        missing = sorted(name for name in info.get("missing_keys", ()) if f".{PROCESSOR}." in name)
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks sparse parameters that its config.json asks for: "
                f"{missing[0]} and {len(missing) - 1} more"
            )
        for processor in sparse_processors(model).values():
            # They were read in float32, which the projection keeps.
            processor.attention.to(dtype=model.dtype)
        return (model, info) if with_info else model

    @property
    def _gradient_checkpointing_func(self) -> Any:
        # diffusers calls it with each block of a forward. What it gets instead knows that forward: checkpoints that
        # copy or move a block's arguments have nothing else to tell them by.
        function = vars(self).get("_gradient_checkpointing_func")
        if function is None or torch.compiler.is_compiling():
            return function
        state = state_of(self)
        return function if state is None else state.bind_checkpointing(function)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Any) -> None:
        vars(self)["_gradient_checkpointing_func"] = function

    def add_adapter(self, adapter_config: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers does, and leaves our projections alone, which a target named "proj" would mean by chance."""
        if getattr(adapter_config, "exclude_modules", False) is None:
            from peft.tuners.tuners_utils import check_target_module_exists

            modules = dict(self.named_modules())
            ours = [f"{name}.{PROCESSOR}.attention.proj" for name in sparse_processors(self)]
            ours = [name for name in ours if name in modules]
            if adapter_config.target_modules != "all-linear":
                # peft warns of exclusions that no target meets.
                ours = [name for name in ours if check_target_module_exists(adapter_config, name)]
            if ours:
                adapter_config = copy.copy(adapter_config)
                adapter_config.exclude_modules = ours
        super().add_adapter(adapter_config, *args, **kwargs)

    @contextlib.contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """As diffusers does: pipelines say here which denoising step this is."""
        said = say_step(kwargs.get("step_index"), kwargs.get("num_inference_steps"))
        with said, super().cache_context(name, **kwargs):
            yield


@functools.cache
def sparse_class(base: type) -> type:
    """The class that a transformer of a diffusers class gets from `sparsify`."""
    # By the name `processor`, our parameters are left out of half precision and of quantization while they are read.
    kept = [*(base._keep_in_fp32_modules or ()), PROCESSOR]
    members = {"__module__": MODULE, "__doc__": base.__doc__, "_keep_in_fp32_modules": kept}
    return type(base.__name__, (SparseModelMixin, base), members)


def model_class(name: str) -> type:
    """The class of `foveal.models` of that name.

    Raises:
        AttributeError: for a name that is of no family in the table.
    """
    if name not in {family.transformer for family in FAMILIES.values()} | {"ModelMixin"}:
        raise AttributeError(f"module {MODULE!r} has no attribute {name!r}")
    import diffusers

    # diffusers looks for the base class that it loads by in the module that it was sent to.
    return diffusers.ModelMixin if name == "ModelMixin" else sparse_class(getattr(diffusers, name))


def become_sparse(transformer: nn.Module) -> None:
    """Gives a transformer of a diffusers class the class that keeps its sparse layers; others keep theirs."""
    cls = type(transformer)
    if cls.__module__.split(".")[0] == "diffusers" and cls.__name__ in {f.transformer for f in FAMILIES.values()}:
        transformer.__class__ = sparse_class(cls)


def become_dense(transformer: nn.Module) -> None:
    """Gives a transformer its former class back."""
    cls = type(transformer)
    if cls.__module__ == MODULE:
        transformer.__class__ = cls.__mro__[2]


def register_components(model: Any) -> None:
    """Has a pipeline write the classes that its transformers have now to `model_index.json`."""
    if not hasattr(model, "register_modules"):
        return
    for name, transformer in components_of(model).items():
        # diffusers looks at the class when a component is set.
        setattr(model, name, transformer)
