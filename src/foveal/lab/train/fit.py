"""Whether settings and data go with a model: its family, latent space, width of text, and the sizes that it can cut."""

from __future__ import annotations

import json
from typing import Any

from foveal.lab.data.dataset import LatentDataset
from foveal.lab.encoding import different_vae, vae_facts
from foveal.lab.hub import hub_options
from foveal.lab.pipelines import PIPELINES
from foveal.lab.train.config import TrainingConfig
from foveal.lab.train.model import training_of, transformer_fields
from foveal.lab.train.settings import DataSettings, ModelSettings
from foveal.models.families.table import FAMILIES
from foveal.models.readers import patch_size


def check_training(config: TrainingConfig) -> None:
    """Check that a run asks of its model what its family can be asked for in training.

    Raises:
        FileNotFoundError, ValueError: as in `transformer_fields`; and for a setting that the family does not go with.
    """
    training, model = training_of(config.model), config.model.path or "model.architecture"
    if training.one_sample and config.micro_batch_size != 1:
        raise ValueError(
            f"micro_batch_size must be 1 for {model}, got {config.micro_batch_size}: its forward takes the text and "
            "the noise level of one sample"
        )
    if training.has_sound and config.context_parallel > 1:
        raise ValueError(
            f"context_parallel must be 1 for {model}, got {config.context_parallel}: training divides only the tokens "
            "of a video without sound"
        )
    if config.objective.first_frame and not training.frame_levels:
        raise ValueError(
            f"objective.first_frame must be 0 for {model}, got {config.objective.first_frame}: its frames have no "
            "noise levels of their own"
        )
    if config.objective.sound_shift is not None and not training.has_sound:
        raise ValueError(f"objective.sound_shift must be None for {model}, which makes no sound")


def check_fit(data: LatentDataset, settings: DataSettings, model: ModelSettings) -> None:
    """Check that a model can be trained on data. Data of older versions is checked by what is known of it.

    Args:
        data: the samples.
        settings: where they come from, for the messages.
        model: the transformer; its weights are not read.

    Raises:
        FileNotFoundError, ValueError: as in `transformer_fields`.
        ValueError: the data is of another family, VAE, or size. The message names both sides.
    """
    source = f"data.clip {settings.clip}" if settings.folder is None else f"data.folder {settings.folder}"
    if model.path is not None:
        fields, training = transformer_fields(model), training_of(model)
        target = f"model.path {model.path}"
        _check_family(data.settings, fields["_class_name"], source, target)
        _check_vae(data.settings, model.place, source, target)
        has_sound = training.has_sound
        channels, text_width, patch = fields["in_channels"], training.text_width(fields), patch_size(fields)
    else:
        sizes, target = model.architecture, "model.architecture"
        channels, text_width, patch = sizes.channels, sizes.text_dim, (1, sizes.patch, sizes.patch)
        has_sound = False
    for shape in data.buckets:
        if shape[0] != channels:
            raise ValueError(f"{source} has latents of {shape[0]} channels, but {target} takes {channels}")
        for name, side, part in zip(("frames", "height", "width"), shape[1:], patch, strict=True):
            if side % part:
                raise ValueError(
                    f"{source} has latents of {name} {side}, but {target} cuts them into patches of {part}, "
                    "which must divide it"
                )
    if has_sound != data.has_sound:
        has, needs = ("has" if data.has_sound else "has no", "makes" if has_sound else "makes no")
        raise ValueError(f"{source} {has} sound (audio_latents), but {target} {needs} sound")
    text = data.text_shapes.get("prompt_embeds")
    if text is not None and text[-1] != text_width:
        raise ValueError(f"{source} has text embeddings of width {text[-1]}, but {target} takes {text_width}")


def _check_family(settings: dict[str, Any], transformer: str, source: str, target: str) -> None:
    kind = PIPELINES.get(settings.get("pipeline"))
    if kind is not None and FAMILIES[kind.family].transformer != transformer:
        raise ValueError(
            f"{source} was made with a {kind.name}, whose transformer is a {FAMILIES[kind.family].transformer}, "
            f"but {target} has a {transformer}"
        )


def _check_vae(settings: dict[str, Any], path: str, source: str, target: str) -> None:
    made_with = settings.get("vae")
    if made_with is None or settings.get("model") == path:
        return
    from diffusers import AutoencoderKLWan

    try:
        # Works for any VAE, because this call only reads the file.
        config = AutoencoderKLWan.load_config(path, subfolder="vae", **hub_options(path))
    except OSError:
        return  # A transformer without a VAE beside it.
    own = vae_facts(config["_class_name"], config)
    name = different_vae(made_with, own)
    if name is not None:
        ours, theirs = (json.dumps(facts[name]) for facts in (made_with, own))
        raise ValueError(
            f"{source} was encoded with another VAE than that of {target}: its {name} is {ours}, here it is {theirs}"
        )
