"""MiniMax-H3's modular pipeline for the commands, which call it as they call diffusers' other pipelines.

The pipeline is that of its workflow from text, `t2va`. A modular pipeline takes blocks instead of options, has no
callback for the end of a step, and counts the end of its schedule as a step.

Shape legend: B batch, F frames, H x W pixels, L text tokens, C width of the text embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INDEX_FILE = "modular_model_index.json"
MINIMAX_H3 = "MiniMaxH3ModularPipeline"
WORKFLOW = "t2va"
# Text is stored with so many tokens, as all samples of a dataset have to be alike; zeros at the end take no room.
MAX_TEXT_TOKENS = 1024


class MiniMaxH3:
    """The pipeline with the arguments that others have; its components and its configuration are attributes.

    Args:
        pipe: a `MiniMaxH3ModularPipeline`, of the workflow from text.
        vae: stands in for the pipeline's, where it has none yet.
    """

    def __init__(self, pipe: Any, vae: nn.Module | None = None) -> None:
        self._pipe, self._vae = pipe, vae

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    @property
    def vae(self) -> nn.Module:
        return self._pipe.vae if self._vae is None else self._vae

    @property
    def transformer(self) -> nn.Module | None:
        return getattr(self._pipe, "transformer", None)

    @transformer.setter
    def transformer(self, transformer: nn.Module) -> None:
        self._pipe.update_components(transformer=transformer)

    def __call__(
        self,
        prompt: str,
        num_frames: int = 124,
        height: int = 768,
        width: int = 1344,
        num_inference_steps: int = 49,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        callback_on_step_end: Callable[..., Any] | None = None,
        return_dict: bool = False,
    ) -> tuple[Any, Any]:
        """Make a video and its sound.

        Args:
            prompt: one prompt.
            num_frames, height, width: of the video.
            num_inference_steps: denoising steps, each of one forward.
            generator: of the noise.
            output_type: of the video, as the pipeline has it, or "latent" for latents.
            callback_on_step_end: called with this, the number of the step, None, and {} after each.
            return_dict: must be False.

        Returns:
            (the videos [1, F, 3, H, W] for "pt", the sound [2, samples]), or latents of both.
        """
        if return_dict:
            raise ValueError("return_dict must be False for a modular pipeline")
        steps = 0

        def end_of_forward(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal steps
            if callback_on_step_end is not None:
                callback_on_step_end(self, steps, None, {})
            steps += 1

        arguments = {
            "prompt": prompt,
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps + 1,
            "generator": generator,
        }
        handle = self.transformer.register_forward_hook(end_of_forward)
        try:
            if output_type == "latent":
                made = self._part(lambda name: not name.startswith("decode"))(
                    **arguments, output=["latents", "audio_latents"]
                )
                return made["latents"], made["audio_latents"]
            made = self._pipe(**arguments, output_type=output_type, output=["videos", "audio"])
            return made["videos"], made["audio"][0]
        finally:
            handle.remove()

    def encode_prompt(self, prompt: list[str]) -> tuple[Tensor, Tensor]:
        """Text embeddings [B, L, C], zero after the text, and which tokens are text: int64 [B, L].

        The empty prompt has no token at all.

        Raises:
            ValueError: a prompt of more than `MAX_TEXT_TOKENS` tokens.
        """
        encoder = self._part(lambda name: name == "text_encoder")
        width = self.text_encoder.config.text_config.hidden_size
        embeds = torch.zeros(len(prompt), MAX_TEXT_TOKENS, width, dtype=self.text_encoder.dtype)
        mask = torch.zeros(len(prompt), MAX_TEXT_TOKENS, dtype=torch.int64)
        for place, text in enumerate(prompt):
            count = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if count > MAX_TEXT_TOKENS:
                raise ValueError(f"a prompt may have {MAX_TEXT_TOKENS} tokens, got {count}: {text[:60]!r}...")
            if count:
                embeds[place, :count] = encoder(prompt=text, output="prompt_embeds")[0]
                mask[place, :count] = 1
        return embeds, mask

    def _part(self, wanted: Callable[[str], bool]) -> Any:
        """A pipeline of some of this one's blocks, with the same components."""
        from diffusers.modular_pipelines import SequentialPipelineBlocks

        blocks = {name: block for name, block in self._pipe.blocks.sub_blocks.items() if wanted(name)}
        part = SequentialPipelineBlocks.from_blocks_dict(blocks).init_pipeline()
        # Those with a default are made already.
        names = [name for name, x in part.components.items() if x is None or isinstance(x, nn.Module)]
        part.update_components(**{name: getattr(self._pipe, name) for name in names})
        # Also without blocks that decode, it asks these for the number of channels.
        part.vae, part.audio_vae = self._pipe.vae, self._pipe.audio_vae
        part.set_progress_bar_config(disable=True)
        return part


def encode_sound(pipe: Any, sound: Tensor) -> Tensor:
    """The latents [2, C, N] of sound, float32 [2, samples], one for each ear, that the transformer trains on."""
    vae = pipe.audio_vae
    latents = vae.encode(sound[:, None].to(vae.device, vae.dtype)).latent_dist.mode()
    mean, std = (torch.tensor(getattr(vae.config, name)).to(latents) for name in ("latents_mean", "latents_std"))
    return (latents - mean[:, None]) / std[:, None]


class _TextOnly:
    """In place of the vision processor, which needs torchvision: prompts have neither images nor videos."""

    def create_mm_token_type_ids(self, rows: list[list[int]]) -> list[list[int]]:
        return [[0] * len(row) for row in rows]


def is_modular(place: str, keyword: dict[str, Any]) -> bool:
    """Whether a folder or a repository of the hub has a modular pipeline and no other."""
    import diffusers

    if Path(place).is_dir():
        return not Path(place, "model_index.json").is_file() and Path(place, INDEX_FILE).is_file()
    try:
        diffusers.DiffusionPipeline.load_config(place, **keyword)
    except OSError as error:
        # Any other error is the hub's, and would be met again.
        if "does not appear to have a file named" not in str(error):
            return False
    else:
        return False
    try:
        diffusers.ModularPipeline.load_config(place, **keyword)
    except OSError:
        return False
    return True


def open_pipeline(place: str, keyword: dict[str, Any]) -> Any:
    """The pipeline without its components."""
    import diffusers

    return diffusers.ModularPipeline.from_pretrained(place, workflow=WORKFLOW, **keyword)


def outline(pipe: Any, keyword: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Its VAE on the meta device, and the configuration of its transformer."""
    specs = [pipe.get_component_spec(name) for name in ("vae", "transformer")]
    vae_config, transformer_config = (
        spec.type_hint.load_config(spec.pretrained_model_name_or_path, subfolder=spec.subfolder, **keyword)
        for spec in specs
    )
    with torch.device("meta"):
        return specs[0].type_hint.from_config(vae_config), transformer_config


def load(pipe: Any, dtypes: dict[str, torch.dtype], device: torch.device, *, without_transformer: bool) -> MiniMaxH3:
    """Load the components of an `open_pipeline`.

    Raises:
        ValueError: a component cannot be loaded; what diffusers logs says why.
    """
    missing = {"processor"} | ({"transformer"} if without_transformer else set())
    names = [name for name in pipe.pretrained_component_names if name not in missing]
    pipe.load_components(names=names, dtype=dtypes)
    for name in names:
        if getattr(pipe, name, None) is None:
            raise ValueError(f"component {name} of {MINIMAX_H3} cannot be loaded")
    pipe.update_components(processor=_TextOnly())
    pipe.set_progress_bar_config(disable=True)
    return MiniMaxH3(pipe.to(device))
