"""Teach a sparse MiniMax-H3 what its dense self does, from prompts alone.

    python examples/distill_minimax_h3.py MiniMaxAI/MiniMax-H3 prompts.txt sparse-h3

The released weights are distilled for guidance, and training them on videos undoes that. Here the model generates with
dense attention, and at every step of its loop the same noisy rows go through it once more, sparse: what `sparsify`
added learns to predict the dense velocity of video and sound. The released weights stay as they are, no video is read,
and the states are those that a generation meets.

The prompts, one a line, are encoded first, so that the text encoder is gone when the transformer comes. VSA's gates are
1.9 billion parameters, SLA's projections 0.8 million. The page on MiniMax-H3 says what a trained model can do. The test
of this script runs it at a tiny size; nobody here has trained the released weights with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.modular_pipelines.minimax_h3.denoise import MiniMaxH3LoopDenoiser
from diffusers.modular_pipelines.minimax_h3.encoders import MiniMaxH3TextEncoderStep
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3CoreDenoiseStep
from torch import Tensor, nn

import foveal

METHODS = {
    "vsa": foveal.VSAConfig(keep_ratio=0.1, tile=(4, 4, 4)),
    "sla": foveal.SLAConfig(keep_ratio=0.1, drop_ratio=0.1),
}


class Student:
    """A sparse transformer and the optimizer of what is new in it.

    Args:
        transformer: dense, in the dtypes of the release.
        config: of its sparse attention.
        learning_rate: of AdamW.
    """

    def __init__(self, transformer: nn.Module, config: Any, learning_rate: float = 1e-4) -> None:
        self.transformer = transformer.requires_grad_(False)
        foveal.sparsify(transformer, config)
        self.parameters = list(foveal.sparse_parameters(transformer).values())
        for parameter in self.parameters:
            # Steps of this size would be lost in bfloat16.
            parameter.data = parameter.data.float()
            parameter.requires_grad_()
        transformer.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)
        self.losses: list[float] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Student:
        """Itself: a pipeline copies its blocks, and the one in them is to learn."""
        return self

    @torch.enable_grad()
    def learn(self, fed: dict[str, Any], taught: tuple[Tensor, Tensor]) -> None:
        """One step towards the velocities of video and sound that dense attention gives for the same arguments."""
        found = self.transformer(**fed)
        loss = sum(F.mse_loss(x.float(), y.float()) for x, y in zip(found, taught, strict=True))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())


class TeachingDenoiser(MiniMaxH3LoopDenoiser):
    """The forward of diffusers' denoising loop, dense, followed by a step of the student."""

    model_name = "minimax-h3"

    def __init__(self, student: Student) -> None:
        self.student = student
        super().__init__()

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        calls: list[dict[str, Any]] = []
        keep = lambda module, args, kwargs: calls.append(kwargs)  # noqa: E731
        handle = components.transformer.register_forward_pre_hook(keep, with_kwargs=True)
        with foveal.dense(components.transformer):
            components, block_state = super().__call__(components, block_state, i, t)
        handle.remove()
        self.student.learn(calls[0], (block_state.noise_pred, block_state.audio_noise_pred))
        return components, block_state


def teaching_blocks(student: Student) -> MiniMaxH3CoreDenoiseStep:
    """diffusers' blocks from noise to latents, in which the student learns."""
    blocks = MiniMaxH3CoreDenoiseStep()
    blocks.sub_blocks["denoise"].sub_blocks["denoiser"] = TeachingDenoiser(student)
    return blocks


@torch.no_grad()
def encoded(source: str, prompts: Iterable[str], device: str) -> list[dict[str, Tensor]]:
    """What the pipeline makes of each prompt, on the CPU; the text encoder is gone afterwards."""
    pipe = MiniMaxH3TextEncoderStep().init_pipeline(source)
    pipe.load_components(dtype=torch.bfloat16)
    pipe.to(device)
    names = ["prompt_embeds", "text_token_tags"]
    return [{name: x.cpu() for name, x in pipe(prompt=prompt, output=names).items()} for prompt in prompts]


def train(pipe: Any, student: Student, texts: list[dict[str, Tensor]], generations: int, **call: Any) -> None:
    """Let the student learn along so many generations, each of another prompt and seed.

    Args:
        pipe: made from `teaching_blocks`.
        call: arguments of the pipeline: `num_frames`, `num_inference_steps`, and so on.
    """
    for index in range(generations):
        text = {name: x.to(student.transformer.device) for name, x in texts[index % len(texts)].items()}
        pipe(**text, generator=torch.Generator().manual_seed(index), output="latents", **call)
        recent = student.losses[-10:]
        print(f"generation {index + 1}: loss {sum(recent) / len(recent):.5f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder or hub id of MiniMax-H3 for diffusers")
    parser.add_argument("prompts", type=Path, help="a text file, one prompt a line")
    parser.add_argument("output", type=Path, help="a folder for what foveal.save writes")
    parser.add_argument("--method", choices=tuple(METHODS), default="vsa")
    parser.add_argument("--generations", type=int, default=100)
    parser.add_argument("--steps", type=int, default=25, help="of a generation, as the pipeline counts them")
    parser.add_argument("--frames", type=int, default=124)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    prompts = [line.strip() for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = encoded(options.source, prompts, options.device)
    torch.cuda.empty_cache()
    loader = MiniMaxH3CoreDenoiseStep().init_pipeline(options.source)
    loader.load_components(dtype=torch.bfloat16)
    student = Student(loader.transformer.to(options.device), METHODS[options.method], options.learning_rate)
    pipe = teaching_blocks(student).init_pipeline()
    names = ("transformer", "scheduler", "audio_scheduler")
    pipe.update_components(**{name: getattr(loader, name) for name in names})
    train(pipe, student, texts, options.generations, num_frames=options.frames, num_inference_steps=options.steps)
    foveal.save(student.transformer, options.output)


if __name__ == "__main__":
    main()
