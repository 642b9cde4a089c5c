"""Whether data is what a model is trained on: the same latent space, text of the same width, sizes that it can cut."""

from __future__ import annotations

import json
from typing import Any

from foveal.lab.data.dataset import LatentDataset
from foveal.lab.pipelines import PIPELINES, different_vae, hub_options, vae_facts
from foveal.lab.train.model import transformer_fields
from foveal.lab.train.settings import DataSettings, ModelSettings
from foveal.models.families.table import FAMILIES


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
        fields = transformer_fields(model)
        target = f"model.path {model.path}"
        _check_family(data.settings, fields["_class_name"], source, target)
        _check_vae(data.settings, model.place, source, target)
        channels, text_width, patch = fields["in_channels"], fields["text_dim"], tuple(fields["patch_size"])
    else:
        sizes, target = model.architecture, "model.architecture"
        channels, text_width, patch = sizes.channels, sizes.text_dim, (1, sizes.patch, sizes.patch)
    for shape in data.buckets:
        if shape[0] != channels:
            raise ValueError(f"{source} has latents of {shape[0]} channels, but {target} takes {channels}")
        for name, side, part in zip(("frames", "height", "width"), shape[1:], patch, strict=True):
            if side % part:
                raise ValueError(
                    f"{source} has latents of {name} {side}, but {target} cuts them into patches of {part}, "
                    "which must divide it"
                )
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
