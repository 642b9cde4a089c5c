"""`SparseAttention`: what runs in the place of ComfyUI's attention in the self-attention layers of one model.

Shape legend: B batch, H heads, L tokens, D head dimension, C hidden width.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foveal.hosts.comfyui.layers import grid_of, host_family, layout_of, packed_layout
from foveal.hosts.comfyui.record import Record
from foveal.layout import TokenLayout, VideoGrid
from foveal.methods.base import Config, LayerCall, method_of
from foveal.models.layers import choose_layers
from foveal.models.policy import Policy
from foveal.models.state import Phase

OVERRIDE = "optimized_attention_override"
# The parameters of ComfyUI's attention functions, in order.
PARAMETERS = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
# The largest side of a picture of kept blocks that is held on the device, in blocks.
PICTURE = 256

BY_POLICY = "the policy's"
COMPILED = "its block is compiled by torch.compile"
NOT_CALLED = "the model or another node bypassed the attention override"
UNPACKED = "this ComfyUI does not say how the model packs its sequence"

LOGGER = logging.getLogger("foveal")

# (layer, step and number of steps or None, query, key, value [B, H, L, D], layout)
Look = Callable[[str, int | None, int | None, Tensor, Tensor, Tensor, VideoGrid | TokenLayout], None]


@dataclass
class _Forward:
    """One forward of the model.

    Attributes:
        latent, patch, reference_first: for `layout_of`.
        packs, packing: whether the model packs its sequence, and how, for `packed_layout`.
        phase: what the policy asks of it.
        step, num_steps: which denoising step it is of how many; None where nothing says it or needs it.
        layer: the self-attention layer that runs; None outside of one.
        hidden_states: what that layer got, [B, L, C].
        gate: what makes its gate where the model has that itself; None elsewhere.
        asked: whether that layer has called the override.
        layouts: by the number of tokens.
    """

    latent: tuple[int, ...]
    patch: tuple[int, int, int]
    reference_first: bool
    packs: bool
    packing: Any
    phase: Phase
    step: int | None
    num_steps: int | None
    layer: str | None = None
    hidden_states: Tensor | None = None
    gate: nn.Module | None = None
    asked: bool = False
    layouts: dict[int, VideoGrid | TokenLayout | None] = field(default_factory=dict)

    def layout(self, tokens: int) -> VideoGrid | TokenLayout | None:
        if tokens not in self.layouts:
            where = self.latent, self.patch, tokens
            self.layouts[tokens] = (
                packed_layout(*where, self.packing)
                if self.packs
                else layout_of(*where, reference_first=self.reference_first)
            )
        return self.layouts[tokens]


class SparseAttention:
    """foveal's attention for one model of ComfyUI.

    Args:
        modules: the method's module of each layer that may be sparse, by name (`build_layers`).
        held: why each other layer stays dense, by name.
        policy: when layers run dense; its steps are those of the sampler that runs the model, its `dense_layers`
            are indices or names of the layers.
        min_tokens: layers with fewer tokens run dense.
        strict: raise a RuntimeError where a layer runs dense for a reason that nobody asked for.
        preview_step: the kept blocks of the first sparse denoising step from this one on, from 0, are recorded.
        gate: the attribute of the model's layers that makes VSA's gate; None where the modules make it.
        look: called for every call of a layer in `modules` that could run sparse; the call then runs dense.

    Attributes:
        record: what the latest sampling run did.
        previous: the override that the model had before, which runs what stays dense; None without one.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        held: Mapping[str, str] | None = None,
        *,
        policy: Policy | None = None,
        min_tokens: int = 0,
        strict: bool = False,
        preview_step: int = 0,
        gate: str | None = None,
        look: Look | None = None,
    ) -> None:
        self.modules = dict(modules)
        self.held = dict(held or {})
        self.policy = Policy() if policy is None else policy
        self.min_tokens, self.strict, self.preview_step, self.look = min_tokens, strict, preview_step, look
        self.gate = gate
        names = {**dict.fromkeys(modules), **dict.fromkeys(self.held)}
        self.dense_layers = frozenset(
            choose_layers(names, self.policy.dense_layers, argument="dense_layers") if self.policy.dense_layers else ()
        )
        self.record = Record()
        self.previous: Callable | None = None
        self._running = threading.local()

    def __deepcopy__(self, memo: dict) -> SparseAttention:
        # ComfyUI copies a model's options deeply whenever a node clones the model.
        return self

    def parameters(self) -> nn.ModuleList:
        """All modules, for whoever manages the device's memory."""
        return nn.ModuleList(self.modules.values())

    def attach(self, patcher: Any) -> Any:
        """A clone of a `ModelPatcher` whose self-attention this runs. The patcher that was given stays as it is.

        Raises:
            ValueError: the model has foveal's attention already.
        """
        model = patcher.clone()
        options = model.model_options["transformer_options"]
        previous = options.get(OVERRIDE)
        if isinstance(getattr(previous, "__self__", None), SparseAttention):
            raise ValueError("model has foveal's sparse attention already; connect this node to the model before that")
        self.previous = previous
        options[OVERRIDE] = self.attend
        model.add_wrapper_with_key("outer_sample", "foveal", self.run_sampling)
        model.add_wrapper_with_key("diffusion_model", "foveal", self.run_forward)
        return model

    def run_sampling(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        """Wrapper around a sampling run: begins a record and ends it."""
        record = self.record = Record()
        try:
            return executor(*args, **kwargs)
        finally:
            record.complete = True
            LOGGER.info("%s", record)

    def run_forward(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper around the diffusion model: (latent, timestep, ...), with the transformer options among the rest.

        The hooks on its self-attention layers are there only while it runs. A model that torch.compile compiles has
        none of this, and stays dense.
        """
        model = executor.class_obj
        if torch.compiler.is_compiling():
            return executor(*args, **kwargs)
        family = host_family(model)
        layers = family.layers(model)
        if any(hasattr(block, "_orig_mod") for block in family.blocks(model).values()):
            for name in layers:
                self._note_dense(name, COMPILED)
            return executor(*args, **kwargs)
        options = kwargs.get("transformer_options") or next((arg for arg in args if isinstance(arg, dict)), {})
        step, num_steps, phase = self._phase(options, args[1] * (1000.0 / family.noise))
        video = args[0] if isinstance(args[0], Tensor) else args[0][0]  # sound is the second of several latents
        forward = _Forward(
            latent=tuple(video.shape),
            patch=family.patch(model),
            packs=family.packing is not None,
            packing=None if family.packing is None else family.packing(options, kwargs),
            reference_first=getattr(model, "ref_conv", None) is not None and kwargs.get("reference_latent") is not None,
            phase=phase,
            step=step,
            num_steps=num_steps,
        )
        outer, self._running.forward = self._forward, forward
        handles = []
        try:
            for name, layer in layers.items():
                enter = functools.partial(self._enter, forward, name)
                handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(layer.register_forward_hook(functools.partial(self._leave, forward), always_call=True))
            self.record.forwards += 1
            return executor(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            self._running.forward = outer

    def attend(self, function: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """ComfyUI's override: the attention `function` and what it was called with, to its output."""
        dense = function if self.previous is None else functools.partial(self.previous, function)
        forward = None if torch.compiler.is_compiling() else self._forward
        if forward is None or forward.layer is None:
            return dense(*args, **kwargs)
        forward.asked = True
        given = dict(zip(PARAMETERS, args, strict=False)) | kwargs
        query, key, value = (_heads_first(given[name], given) for name in ("q", "k", "v"))
        reason = self._why_dense(forward, query, key, given)
        if reason is None and self.look is not None:
            place = forward.layer, forward.step, forward.num_steps
            self.look(*place, query, key, value, forward.layout(query.shape[2]))
            reason = "it is looked at"
        if reason is not None:
            self._note_dense(forward.layer, reason)
            return dense(*args, **kwargs)
        output = self._run_method(forward, query, key, value)
        return output if given.get("skip_output_reshape") else output.transpose(1, 2).flatten(2)

    @property
    def _forward(self) -> _Forward | None:
        return getattr(self._running, "forward", None)

    def _enter(self, forward: _Forward, name: str, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        forward.layer, forward.asked = name, False
        hidden_states = args[0] if args else kwargs["x"]
        forward.hidden_states = hidden_states if hidden_states.dim() == 3 else hidden_states[None]
        forward.gate = None if self.gate is None else getattr(layer, self.gate)

    def _leave(self, forward: _Forward, layer: nn.Module, args: tuple, output: Any) -> None:
        name, asked = forward.layer, forward.asked
        forward.layer = forward.hidden_states = forward.gate = None
        # After an error there is no output, and the error says more.
        if not asked and output is not None:
            self._note_dense(name, NOT_CALLED)

    def _phase(self, options: dict[str, Any], timestep: Tensor) -> tuple[int | None, int | None, Phase]:
        # To know the step, the host waits for the device.
        wanted = self.policy.counts_steps or self.preview_step or self.look is not None
        step, num_steps = _step_of(options) if wanted else (None, None)
        if step is None and self.policy.counts_steps:
            raise ValueError(
                "the policy counts denoising steps, and the sampler does not say which one this is: use one that "
                "gives sample_sigmas, or a policy of timesteps"
            )
        at = float(timestep.max()) if self.policy.reads_timestep else None
        return step, num_steps, self.policy.phase(step, num_steps, at)

    def _why_dense(self, forward: _Forward, query: Tensor, key: Tensor, given: dict[str, Any]) -> str | None:
        name, tokens = forward.layer, query.shape[2]
        if name in self.held:
            return self.held[name]
        if name in self.dense_layers:
            return f"{BY_POLICY} dense_layers"
        if forward.phase.dense:
            return forward.phase.why
        if given.get("mask") is not None:
            return "it has an attention mask"
        scale = given.get("scale")
        if scale is not None and abs(scale * query.shape[-1] ** 0.5 - 1) > 1e-4:
            return f"its softmax scale is {scale:g}"
        layout = forward.layout(tokens)
        if forward.packs and forward.packing is None:
            return UNPACKED
        if layout is None or key.shape[2] != tokens:
            return f"{tokens} queries and {key.shape[2]} keys do not fit a latent of {forward.latent}"
        if tokens < self.min_tokens:
            return f"it has {tokens:,} tokens, fewer than {self.min_tokens:,}"
        if grid_of(layout).num_tokens < self.policy.min_tokens:
            return f"{BY_POLICY} min_tokens"
        return None

    def _note_dense(self, name: str, reason: str) -> None:
        self.record.of(name).dense[reason] += 1
        asked_for = name in self.held or self.look is not None or reason.startswith(BY_POLICY)
        if self.strict and not asked_for:
            raise RuntimeError(f"layer {name} would run dense, and strict forbids it: {reason}")

    def _run_method(self, forward: _Forward, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        module, layout = self.modules[forward.layer], forward.layout(query.shape[2])
        config = forward.phase.apply(module.config)
        method = method_of(config)
        hidden_states, gates = forward.hidden_states, None
        if forward.gate is not None:
            # In two dimensions, as the model itself has them: its layers may be quantized.
            made = forward.gate(hidden_states.flatten(0, 1)).unflatten(0, hidden_states.shape[:2])
            hidden_states, gates = None, (_heads_first(made, {"heads": query.shape[1]}), None)
        with _on_device(module, query.device):
            call = LayerCall(query, key, value, hidden_states, layout, config=config, gates=gates)
            output = method.run(module, call)
        layer = self.record.of(forward.layer)
        ran = module.ran
        layer.sparse[ran.impl, method.cells(config, grid_of(layout)).keep, ran.why] += 1
        if layout not in self.record.layouts:
            self.record.layouts.append(layout)
        if layer.kept is None and (forward.step is None or forward.step >= self.preview_step):
            layer.kept, layer.kept_share = _kept_blocks(module, query, key, layout, config)
            layer.step = forward.step
        return output


def _heads_first(x: Tensor, given: dict[str, Any]) -> Tensor:
    """[B, L, H * D], or [B, H, L, D] where the caller reshaped already, to [B, H, L, D] without a copy."""
    return x if given.get("skip_reshape") else x.unflatten(2, (given["heads"], -1)).transpose(1, 2)


def _step_of(options: dict[str, Any]) -> tuple[int | None, int | None]:
    """(denoising step, how many) of a forward, from the schedule of the sampler that runs it."""
    schedule, sigmas = options.get("sample_sigmas"), options.get("sigmas")
    if schedule is None or sigmas is None or len(schedule) < 2:
        return None, None
    now = float(sigmas.max()) * (1 - 1e-4)
    # A step of a second-order sampler also evaluates between two sigmas.
    passed = sum(sigma >= now for sigma in schedule.tolist())
    steps = len(schedule) - 1
    return min(max(passed - 1, 0), steps - 1), steps


@contextlib.contextmanager
def _on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module's parameters on a device inside, and afterwards where they were."""
    former = next((parameter.device for parameter in module.parameters()), device)
    if former == device:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(former)


@torch.no_grad()
def _kept_blocks(
    module: nn.Module, query: Tensor, key: Tensor, layout: VideoGrid | TokenLayout, config: Config
) -> tuple[Tensor, Tensor]:
    """The share of heads that keep each block in the last sample, at most PICTURE blocks a side; and its mean."""
    kept = module.select(query[-1:], key[-1:], layout=layout, config=config).critical_mask()[0].float().mean(0)
    sides = [min(side, PICTURE) for side in kept.shape]
    return nn.functional.adaptive_avg_pool2d(kept[None], sides)[0], kept.mean()
