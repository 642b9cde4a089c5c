"""A training step of MiniMax-H3, dense and sparse, from a few layers of its full width with random weights.

On the device machine, from the repository's root, with the wheel of diffusers installed into /tmp/site:

    PYTHONPATH=/tmp/site:src python3 benchmarks/minimax_h3_training.py --budget-seconds 540 --commit COMMIT \\
        --output $OUT/minimax-h3-training.json --resume benchmarks/results/minimax-h3-training.json

It times and writes as `minimax_h3.py` does: steps with 1 and with 3 of the 50 blocks, of which a block takes the
difference over 2. `--layers 1 24` times about half the model, which fits into 140 GiB at 15 s.

What is timed is the step of the recipes `minimax-h3-vsa` and `minimax-h3-sla`: one sample of video and sound, the
frozen weights in bfloat16, LoRA of the recipes' rank, and gates or projections in float32, forward under autocast with
the blocks checkpointed, backward, clipping, fused AdamW. The dense arm trains LoRA only. An arm counts only if its loss
is finite and everything that the first block trains has a gradient in the second step (in the first, some factors of
LoRA and the linear branch have none, since others start at zero).

The recipes' loss compares with the velocities of a teacher, the same weights with dense attention. That is one more
forward without gradients in each step; `teacher` times it. Speed-ups are of the step with given targets over the dense
step with given targets; `speedup_with_teacher` adds the teacher to the sparse step only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from minimax_h3 import ARMS, DENSE, Arm, Request, Script, arm_model, first_call, run
from peft import LoraConfig
from torch import Tensor, nn

import foveal
from foveal.lab.train.model import choose_trained, compile_blocks, trained_parameters, velocities
from foveal.lab.train.objective import levels_of, noised, velocity_loss
from foveal.lab.train.optimization import build_optimizer, optimizer_step, warmup_and_decay
from foveal.lab.train.settings import LoraSettings
from foveal.models.training import Streams

TEACHER = "teacher"
TRAINING_ARMS = {name: ARMS[name] for name in (DENSE, "VSA 10 %", "SLA 5 %")} | {TEACHER: Arm()}
LORA = LoraSettings()
# Of the video and the sound, as the model's schedulers have them.
SHIFTS = (12.0, 3.0)


class Sample:
    """What a step gets: noisy latents of video and sound, their velocities, noise levels, and the text."""

    def __init__(self, request: Request, model: nn.Module) -> None:
        config, words = model.config, request.shape["text_tokens"]
        generator = torch.Generator(model.device).manual_seed(1)
        # The sound has one entry for each ear.
        sizes = (
            (1, config.in_channels, *request.latent),
            (1, 2, config.audio_in_channels, request.shape["audio_tokens"] // 2),
        )
        clean, noise = (
            tuple(torch.randn(size, generator=generator, device=model.device) for size in sizes) for _ in range(2)
        )
        self.levels = levels_of(torch.full((1,), 0.7, device=model.device), SHIFTS)
        self.noisy, self.target = noised(clean, noise, self.levels)
        self.text = {
            "prompt_embeds": torch.randn(1, words, config.text_dim, generator=generator, device=model.device),
            "prompt_attention_mask": torch.ones(1, words, dtype=torch.bool, device=model.device),
        }

    def predicted(self, model: nn.Module) -> Streams:
        """The model's velocities, as the trainer computes them; on a CPU in float32, without autocast."""
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            return velocities(model, self.noisy, self.levels, self.text)


class Forwards:
    """Forwards of the frozen dense model, with the first few of its blocks."""

    def __init__(self, model: nn.Module, sample: Sample) -> None:
        self.model, self.blocks, self.sample = model, model.transformer_blocks, sample

    def __call__(self, layers: int) -> tuple[Tensor, ...]:
        self.model.transformer_blocks = self.blocks[:layers]
        try:
            return self.work()
        finally:
            self.model.transformer_blocks = self.blocks

    @torch.no_grad()
    def work(self) -> tuple[Tensor, ...]:
        """The velocities of video and sound."""
        return self.sample.predicted(self.model)


class TrainingSteps(Forwards):
    """Steps of one arm's model, each with the first few of its blocks."""

    def __init__(self, model: nn.Module, sample: Sample) -> None:
        super().__init__(model, sample)
        self.trained = trained_parameters(model)
        self.optimizer = build_optimizer([{"params": list(self.trained.values()), "lr": 1e-4}])
        self.schedule = warmup_and_decay(self.optimizer, steps=1000, warmup=0)

    def work(self) -> tuple[Tensor, ...]:
        """The loss and the norm of the gradients, on the host."""

        def losses() -> Iterator[Tensor]:
            yield velocity_loss(self.sample.predicted(self.model), self.sample.target, self.sample.levels).mean()

        report = optimizer_step(
            list(self.trained.values()), self.optimizer, self.schedule, losses(), accept=lambda loss, norm: True
        )
        return torch.tensor(report.loss), torch.tensor(report.gradient_norm)


def prepare(
    arm: Arm, mode: str, request: Request, base: nn.Module, dense: Tensor | None, smoke: bool
) -> tuple[Forwards, dict[str, Any], None]:
    """An arm that is ready to be timed, and what is known about it.

    Raises:
        RuntimeError: out of memory, a backend that cannot run, a loss that is not finite, or a parameter that does not
            learn.
    """
    model = arm_model(arm, base, smoke)
    sample = Sample(request, model)
    if arm is not TRAINING_ARMS[TEACHER]:
        lora = LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=list(LORA.targets))
        model.add_adapter(lora)
        choose_trained(model, "lora")
        for parameter in trained_parameters(model).values():
            parameter.data = parameter.data.float()
        model.enable_gradient_checkpointing()
        model.train()
    if mode == "compiled":
        compile_blocks(model, dynamic=False, fullgraph=True)
    if arm is TRAINING_ARMS[TEACHER]:
        steps = Forwards(model, sample)
        return steps, first_call(steps, len(model.transformer_blocks)), None
    steps = TrainingSteps(model, sample)
    known: dict[str, Any] = first_call(steps, len(model.transformer_blocks))
    known["ran"] = foveal.summary(model).rows[0].ran
    # The factors of LoRA that start at zero have left it, so everything has a gradient now.
    steps(1)
    block = {name: x for name, x in steps.trained.items() if name.startswith("transformer_blocks.0.")}
    idle = [name for name, parameter in block.items() if parameter.grad is None or not parameter.grad.any()]
    if idle:
        raise RuntimeError(f"no gradient for {', '.join(idle)}")
    known["trained_parameters_of_a_block"] = sum(x.numel() for x in block.values())
    return steps, known, None


def add_teacher(group: dict[str, Any]) -> None:
    """Put into the sparse arms what a step takes with the forward of its teacher, if that was timed."""
    arms = group["arms"]
    teacher, dense = arms.get(TEACHER, {}), arms.get(DENSE, {})
    teacher.pop("speedup", None)
    for name, arm in arms.items():
        if name not in (DENSE, TEACHER) and all("step_seconds" in x for x in (arm, teacher, dense)):
            arm["step_seconds_with_teacher"] = arm["step_seconds"] + teacher["step_seconds"]
            arm["speedup_with_teacher"] = dense["step_seconds"] / arm["step_seconds_with_teacher"]


def main(arguments: list[str] | None = None) -> None:
    facts = {"lora_rank": LORA.rank, "lora_targets": list(LORA.targets), "checkpointing": True}
    run(
        Script(__doc__, "minimax-h3-training", TRAINING_ARMS, prepare, add_teacher, clips=("15.1 s",), facts=facts),
        arguments,
    )


if __name__ == "__main__":
    main()
