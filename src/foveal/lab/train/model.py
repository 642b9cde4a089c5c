"""The model of a run: built or loaded, made sparse, its trained parameters chosen, annealed, and called."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from foveal.lab.data.shards import LATENTS
from foveal.lab.hub import hub_options
from foveal.lab.train.config import TrainingConfig
from foveal.lab.train.objective import scheduler_shift
from foveal.lab.train.settings import Annealing, ModelSettings, WanArchitecture
from foveal.layout import VideoGrid
from foveal.methods.base import Config, method_of
from foveal.models import dense, reconfigure, sparse_parameters, sparsify
from foveal.models.families.table import FAMILIES, family_of
from foveal.models.files.manifest import check_component
from foveal.models.files.persist import load_parameters
from foveal.models.files.policy_file import ComponentPolicy, read_policy
from foveal.models.policy import attach_policy
from foveal.models.processor import sparse_processors
from foveal.models.readers import grid_of_latent
from foveal.models.training import Streams, Training

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRAINED_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.training is not None)


def build_model(config: TrainingConfig, *, empty: bool = False) -> nn.Module:
    """The transformer of a run on the CPU: its weights, sparse attention, adapters, and what requires a gradient.

    The same configuration gives the same weights.

    Args:
        config: the run's configuration.
        empty: all but the weights, on the meta device.

    Raises:
        FileNotFoundError, ValueError: as `transformer_fields` does.
        ValueError: as `load_parameters` does.
        ValueError: for layers that the model does not have, or a policy file that is not for it.
    """
    torch.manual_seed(config.seed)
    frozen = config.optimizer.trainable in ("new", "lora")
    dtype = DTYPES[config.model.frozen_dtype] if frozen else torch.float32
    model = load_transformer(config.model, empty=empty, dtype=dtype)
    layers = config.sparsity.layer_configs(len(family_of(model).self_attention_layers(model)))
    how = {"impl": config.sparsity.impl, "on_fallback": config.sparsity.on_fallback}
    if layers:
        sparsify(model, layers=layers, **how)
    if config.sparsity.policy is not None:
        component, where = policy_component(config), f"{config.sparsity.policy}: {config.model.subfolder}"
        check_component(where, model, component.family, component.layers, component.policy)
        sparsify(model, layers=component.layers, **how)
        # Evaluations and samples are no generations whose steps a policy could count.
        attach_policy(model, dataclasses.replace(component.policy, dense_first_steps=0, dense_last_steps=0))
    if config.sparsity.parameters is not None and not empty:
        load_parameters(model, config.sparsity.parameters)
    if config.optimizer.trainable == "lora":
        _add_lora(model, config)
    choose_trained(model, config.optimizer.trainable)
    # diffusers' own list of what bfloat16 spoils.
    precise = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        frozen = not parameter.requires_grad and not precise & set(name.split("."))
        parameter.data = parameter.data.to(DTYPES[config.model.frozen_dtype] if frozen else torch.float32)
    if config.model.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def policy_component(config: TrainingConfig) -> ComponentPolicy:
    """What the policy file of a run says of the transformer that is trained, one of those of its pipeline.

    Raises:
        FileNotFoundError, ValueError: as `read_policy` does; and for a file that does not name this transformer.
    """
    path, name = config.sparsity.policy, config.model.subfolder
    found = read_policy(path)
    if name not in found:
        raise ValueError(
            f"policy file {path} is for {' and '.join(found)}, but training takes {name} of the pipeline; "
            "model.subfolder chooses another"
        )
    return found[name]


def compile_blocks(model: nn.Module, *, keep_exchanged: bool | None = None, **settings: Any) -> None:
    """torch.compile of a diffusers transformer's repeated blocks, for training.

    Without Inductor's reductions of mixed order, on by default since PyTorch 2.10: of a parameter that several
    modulated norms take their slices from, as Wan's `scale_shift_table` is, they leave most of the gradient unwritten
    (https://github.com/pytorch/pytorch/issues/193061, in 2.14.1 still).

    Where diffusers checkpoints gradients, the blocks do it themselves afterwards: what is compiled then holds the
    second forward too. Python runs through a block twice a step instead of three times; no hook of FSDP2 runs again.

    Under context parallelism Inductor puts what does not need them behind the exchanges of tokens, weight gradients
    for example. Without collectives in a graph its order stays what it was.

    Args:
        keep_exchanged: under context parallelism, whether checkpoints keep the queries, keys, values and outputs that
            were exchanged, or exchange them again in the backward; None without.
        settings: the options of torch.compile.
    """
    from torch._inductor import config

    how: dict[str, Any] = {"use_reentrant": False}
    if keep_exchanged is not None:
        policy = _save_exchanged if keep_exchanged else _save_nothing
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    if model.is_gradient_checkpointing:
        model.disable_gradient_checkpointing()
        for block in model.modules():
            if type(block).__name__ in model._repeated_blocks:
                block.forward = functools.partial(_checkpointed, block.forward, how)
    options = {
        "reorder_for_compute_comm_overlap": True,
        "reorder_for_compute_comm_overlap_passes": ["reorder_compute_for_overlap"],
    }
    if hasattr(config.triton, "mix_order_reduction"):
        options["triton.mix_order_reduction"] = False
    settings["options"] = options | settings.get("options", {})
    model.compile_repeated_blocks(**settings)


def _checkpointed(forward: Callable[..., Any], how: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """A forward that keeps little more than its inputs for the backward; a function, so that a compiler can read it."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, **how, **kwargs)


def _save_exchanged(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What a checkpoint keeps: what all-to-alls brought."""
    arrived = op == torch.ops._c10d_functional.wait_tensor.default
    return CheckpointPolicy.MUST_SAVE if arrived else CheckpointPolicy.PREFER_RECOMPUTE


def _save_nothing(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def load_transformer(settings: ModelSettings, *, empty: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The dense transformer, from its folder or with random weights; on the meta device if `empty`.

    Args:
        settings: which one.
        empty: without weights.
        dtype: of weights from a folder, without those that diffusers keeps in float32. Random weights are float32.

    Raises:
        FileNotFoundError, ValueError: as `transformer_fields` does.
    """
    with torch.device("meta") if empty else contextlib.nullcontext():
        if settings.path is None:
            return build_wan(settings.architecture)
        import diffusers

        fields = transformer_fields(settings)
        cls = getattr(diffusers, fields["_class_name"])
        if empty:
            return cls.from_config(fields)
        options = hub_options(settings.place)
        return cls.from_pretrained(settings.place, subfolder=settings.subfolder, torch_dtype=dtype, **options)


def transformer_fields(settings: ModelSettings) -> dict[str, Any]:
    """The configuration of the transformer at `settings.path`, read without its weights.

    Raises:
        FileNotFoundError: no configuration there.
        ValueError: a transformer that training does not know how to call, or one without a pipeline's folder around it.
    """
    from diffusers import WanTransformer3DModel

    place, alone = f"{settings.path}/{settings.subfolder}", False
    folder = Path(settings.place)
    if not (folder / settings.subfolder / "config.json").is_file() and (folder / "config.json").is_file():
        place, alone = settings.path, True
    try:
        # Works for any model, because this call only reads the file.
        fields = WanTransformer3DModel.load_config(
            settings.place, subfolder=None if alone else settings.subfolder, **hub_options(settings.place)
        )
    except OSError as error:
        raise FileNotFoundError(f"model.path: no config.json of {place} ({str(error).splitlines()[0]})") from error
    name = fields.get("_class_name")
    family = next((family for family in FAMILIES.values() if family.transformer == name), None)
    if family is None or family.training is None:
        what = "no family that foveal knows"
        if family is not None:
            what = f"family {family.name!r}, which converts but is not trained yet"
        trained = " or ".join(map(repr, TRAINED_FAMILIES))
        raise ValueError(f"training takes transformers of family {trained}; {place} has a {name}, of {what}")
    taken = fields.get("in_channels")
    given = fields.get("out_channels") or taken
    if family.training.conditioned(fields) or taken != given:
        raise ValueError(
            f"training takes text-to-video transformers; {place} takes {taken} channels and gives {given}: "
            "it is conditioned on an image, which training does not provide"
        )
    if alone:
        raise ValueError(
            f"model.path must be a pipeline's folder with {settings.subfolder!r} in it, {place} is a transformer's own"
        )
    return fields


def noise_shift(config: TrainingConfig) -> float:
    """The shift of the noise schedule: the setting, or that of the model's own scheduler.

    Raises:
        FileNotFoundError, ValueError: `transformer_fields` refuses the model, or there is no setting and no model.
    """
    if config.objective.shift is not None:
        return config.objective.shift
    if config.model.path is None:
        raise ValueError("objective.shift is needed with model.architecture: random weights have no scheduler")
    from diffusers import FlowMatchEulerDiscreteScheduler

    # This check comes first, because another family's scheduler would be refused for a misleading reason.
    transformer_fields(config.model)
    # This class reads the file of any scheduler.
    return scheduler_shift(
        FlowMatchEulerDiscreteScheduler.load_config(
            config.model.place, subfolder="scheduler", **hub_options(config.model.place)
        )
    )


def noise_shifts(config: TrainingConfig) -> tuple[float, ...]:
    """`noise_shift`, and that of the sound where samples have sound: the setting, or its scheduler's, or the video's.

    Raises:
        FileNotFoundError, ValueError: as in `noise_shift`.
    """
    shift = noise_shift(config)
    if not training_of(config.model).has_sound:
        return (shift,)
    if config.objective.sound_shift is not None:
        return shift, config.objective.sound_shift
    from diffusers import FlowMatchEulerDiscreteScheduler

    try:
        settings = FlowMatchEulerDiscreteScheduler.load_config(
            config.model.place, subfolder="audio_scheduler", **hub_options(config.model.place)
        )
    except OSError:  # the pipeline has one scheduler for both
        return shift, shift
    return shift, scheduler_shift(settings)


def training_of(settings: ModelSettings) -> Training:
    """How the transformer of these settings is trained.

    Raises:
        FileNotFoundError, ValueError: as `transformer_fields` does.
    """
    if settings.path is None:
        return FAMILIES["wan"].training
    name = transformer_fields(settings)["_class_name"]
    return next(family.training for family in FAMILIES.values() if family.transformer == name)


def check_first_frame(config: TrainingConfig) -> None:
    """Check that a run which gives first frames has a model that takes a timestep for each token.

    Raises:
        ValueError: its pipeline gives the model one timestep for all tokens.
    """
    if not config.objective.first_frame or config.model.path is None:
        return
    from diffusers import DiffusionPipeline

    settings = DiffusionPipeline.load_config(config.model.place, **hub_options(config.model.place))
    if not settings.get("expand_timesteps", False):
        raise ValueError(
            f"objective.first_frame must be 0 for {config.model.path}, got {config.objective.first_frame}: "
            "its pipeline has no expand_timesteps, so the model takes one timestep for all tokens"
        )


def build_wan(sizes: WanArchitecture, *, given_channels: int = 0) -> nn.Module:
    """A `WanTransformer3DModel` with random weights from torch's global generator.

    Args:
        sizes: the transformer's sizes.
        given_channels: channels of the input beside the noisy video, as image-to-video models have.
    """
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, sizes.patch, sizes.patch),
        num_attention_heads=sizes.num_heads,
        attention_head_dim=sizes.head_dim,
        in_channels=sizes.channels + given_channels,
        out_channels=sizes.channels,
        text_dim=sizes.text_dim,
        freq_dim=sizes.freq_dim,
        ffn_dim=sizes.ffn_dim,
        num_layers=sizes.num_layers,
        rope_max_seq_len=sizes.rope_max_seq_len,
    )


def _add_lora(model: nn.Module, config: TrainingConfig) -> None:
    from peft import LoraConfig

    lora = config.lora
    model.add_adapter(
        LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets))
    )


def choose_trained(model: nn.Module, trainable: str) -> None:
    """Sets `requires_grad` of every parameter.

    Args:
        model: the model, with its sparse attention and its adapters in place.
        trainable: see `OptimizerSettings`.
    """
    new = sparse_parameters(model)
    layers = tuple(f"{name}." for name in family_of(model).self_attention_layers(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            name in new
            or trainable == "all"
            or (trainable == "attention" and name.startswith(layers))
            or (trainable == "lora" and ".lora_" in name)
        )


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def anneal(model: nn.Module, final: Config, annealing: Annealing, step: int) -> float | None:
    """Sets what every sparse layer keeps in optimizer step `step` (from 1); returns it, None while dense.

    Args:
        model: sparse.
        final: the configuration that annealing ends at.
    """
    schedule = method_of(final).schedule
    kept = annealing.kept(step, schedule.amount(final))
    if kept is None:
        return None
    config = schedule.keep(final, kept)
    if any(processor.config != config for processor in sparse_processors(model).values()):
        reconfigure(model, config)
    return schedule.amount(config)


@contextlib.contextmanager
def teaching(model: nn.Module) -> Iterator[None]:
    """The model as it was before it was made sparse and adapted: dense attention, adapters off."""
    adapted = getattr(model, "_hf_peft_config_loaded", False)
    with dense(model):
        if adapted:
            model.disable_adapters()
        try:
            yield
        finally:
            if adapted:
                model.enable_adapters()


def velocities(model: nn.Module, noisy: Streams, sigmas: Streams, text: dict[str, Tensor]) -> Streams:
    """The model's predictions for each tensor of the samples, float32, in its shape.

    Args:
        model: a transformer of a family that is trained, or one wrapped by DDP.
        noisy: the latents of the videos [B, C, F, H, W], and of their sound where the family has it.
        sigmas: noise levels [B] of each; those of videos may be [B, F] for a model with a timestep for each token.
        text: a batch's text tensors; empty where there is no text, which gives Wan one zero token.
    """
    inner = getattr(model, "module", model)
    training = family_of(inner).training
    outputs = model(**training.arguments(inner, noisy, sigmas, text), return_dict=False)
    return tuple(x.float() for x in training.velocities(inner, outputs, noisy))


def velocity(model: nn.Module, noisy: Tensor, sigmas: Tensor, text: dict[str, Tensor]) -> Tensor:
    """`velocities` for a model of videos without sound."""
    return velocities(model, (noisy,), (sigmas,), text)[0]


def streams_of(batch: dict[str, Any]) -> Streams:
    """The latents of a dataset's item or batch, float32: the video's, and the sound's if it has sound."""
    return tuple(batch[name].float() for name in LATENTS if name in batch)


def token_grid(model: nn.Module, shape: tuple[int, ...]) -> VideoGrid:
    """The grid of tokens of latents of some shape, [..., F, H, W]."""
    return grid_of_latent(model, shape[-3:])
