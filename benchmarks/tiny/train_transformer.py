"""The tiny model's transformer: flow matching, with the first frame given to six samples in ten."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import model as parts
import torch
from common import DEVICE, RANK, RANKS, autocast, data_parallel, first_rank_says, machine, weights_of, write
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.lab.train.model import compile_blocks
from foveal.lab.train.objective import NUM_TRAIN_TIMESTEPS, sample_sigmas

SIGMAS = (0.2, 0.45, 0.7, 0.9)
HELD_OUT = 64  # clips of the held-out loss


class Data:
    """Latents, captions, and the index of each caption's embedding and text, on the device."""

    def __init__(self, work: Path, held_out: int = HELD_OUT) -> None:
        tensors, facts = load_file(work / "latents.safetensors"), json.loads((work / "latents.json").read_text())
        number = {text: index for index, text in enumerate(facts["texts"])}
        names = ("train", "train-mirrored")
        captions = [text for name in names for text in facts["captions"][name]]
        self.latents = torch.cat([tensors[name] for name in names]).to(DEVICE)
        self.caption = torch.tensor([number[text] for text in captions], device=DEVICE)
        stride = max(1, len(tensors["held-out"]) // held_out)
        self.held_out = tensors["held-out"][::stride][:held_out].to(DEVICE)
        texts = facts["captions"]["held-out"][::stride][:held_out]
        self.held_out_caption = torch.tensor([number[text] for text in texts], device=DEVICE)
        self.texts, self.texts_of_captions = tensors["texts"].to(DEVICE), list(facts["texts"])
        self.empty = number[""]

    def text(self, caption: Tensor) -> Tensor:
        """[B, 512, C], with zeros after the caption as the pipeline pads it."""
        text = self.texts[caption]
        return F.pad(text, (0, 0, 0, parts.TEXT_TOKENS - text.shape[1]))


def levels_of_frames(sigmas: Tensor, given: Tensor, frames: int) -> Tensor:
    """[B, 1, F, 1, 1]: the noise levels [B], but 0 for a given first frame."""
    level = sigmas.view(-1, 1, 1, 1, 1).expand(-1, 1, frames, 1, 1).clone()
    level[:, :, 0] *= ~given.view(-1, 1, 1, 1)
    return level


def velocity_of(model: nn.Module, x: Tensor, sigmas: Tensor, given: Tensor, text: Tensor) -> Tensor:
    """float32, like x [B, C, F, H, W], which has these noise levels [B]."""
    timesteps = NUM_TRAIN_TIMESTEPS * levels_of_frames(sigmas, given, x.shape[2]).flatten(1)
    timesteps = timesteps.repeat_interleave((x.shape[3] // 2) * (x.shape[4] // 2), 1)
    with autocast():
        return model(x, timesteps, text, return_dict=False)[0].float()


def masked_mean(errors: Tensor, mask: Tensor) -> Tensor:
    """The mean [B] of errors [B, C, F, H, W] where the mask, which broadcasts, is 1."""
    return (errors * mask).flatten(1).sum(1) / mask.expand_as(errors).flatten(1).sum(1)


def loss_and_velocity(
    model: nn.Module, clean: Tensor, noise: Tensor, sigmas: Tensor, given: Tensor, text: Tensor
) -> tuple[Tensor, Tensor]:
    """Flow-matching loss [B] over the frames that are not given, and the velocity."""
    level = levels_of_frames(sigmas, given, clean.shape[2])
    velocity = velocity_of(model, (1 - level) * clean + level * noise, sigmas, given, text)
    mask = (level > 0).float()
    return masked_mean((velocity - (noise - clean)).square(), mask), velocity


def loss_of(model: nn.Module, *values: Tensor) -> Tensor:
    """The loss of `loss_and_velocity`."""
    return loss_and_velocity(model, *values)[0]


def taught_loss(model: nn.Module, *values: Tensor, teacher: nn.Module, share: float) -> Tensor:
    """The loss of `loss_and_velocity` and, at this share of the sum, that against the teacher's velocity."""
    clean, _, sigmas, given, _ = values
    loss, velocity = loss_and_velocity(model, *values)
    with torch.no_grad():
        taught = loss_and_velocity(teacher, *values)[1]
    mask = (levels_of_frames(sigmas, given, clean.shape[2]) > 0).float()
    return (1 - share) * loss + share * masked_mean((velocity - taught).square(), mask)


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Data, batch: int) -> dict[str, float]:
    """Mean loss by mode: from text, and from text and the first frame."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(data.held_out.shape, generator=generator)
    losses = {}
    for name, given in (("text", False), ("frame", True)):
        found = []
        for start in range(0, len(noise), batch):
            clean = data.held_out[start : start + batch].float()
            level = [SIGMAS[(start + i) % len(SIGMAS)] for i in range(len(clean))]
            mask = torch.full((len(clean),), given, device=DEVICE)
            text = data.text(data.held_out_caption[start : start + batch])
            sigmas = torch.tensor(level, device=DEVICE)
            found.append(loss_of(model, clean, noise[start : start + batch].to(DEVICE), sigmas, mask, text))
        losses[name] = torch.cat(found).mean().item()
    return losses


def optimizers(model: nn.Module, name: str, rate: float) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "blocks." in n and "table" not in n]
    if name == "adamw":
        matrices = []
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    cuda = DEVICE.type == "cuda"
    first = torch.tensor(rate, device=DEVICE) if cuda else rate
    how = {"betas": (0.9, 0.98), "weight_decay": 0.01, "fused": cuda, "capturable": cuda}
    found = [torch.optim.AdamW(rest, lr=first, **how)]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = rate
    return found


def rate_at(step: int, steps: int) -> float:
    """Warm-up over 300 steps, constant, and down to zero over the last third."""
    return min((step + 1) / 300, 1.0, 3 * (steps - step) / steps)


class Step:
    """A training step: gradients, clipping, and the optimizers. On one GPU it is one CUDA graph.

    Launched one by one, the kernels of a step take the host longer than the GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        found: list[torch.optim.Optimizer],
        values: tuple[Tensor, ...],
        *,
        graphed: bool,
        loss: Callable[..., Tensor] | None = None,
    ) -> None:
        self.model, self.optimizers, self.loss_of = model, found, loss or loss_of
        self.values, self.graph = tuple(value.clone() for value in values), None
        if graphed:
            self.graph = self._captured()

    def __call__(self, values: tuple[Tensor, ...], share: float) -> Tensor:
        """The loss at `share` of the optimizers' rates."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(group["peak"] * share)
                else:
                    group["lr"] = group["peak"] * share
        if self.graph is None:
            self._clear()
            self._update(values)
        else:
            for mine, value in zip(self.values, values, strict=True):
                mine.copy_(value)
            self.graph.replay()
        return self.loss

    def _update(self, values: tuple[Tensor, ...]) -> None:
        loss = self.loss_of(self.model, *values).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.loss = loss.detach()

    def _clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Warms up and records a step; weights and optimizers are afterwards what they were."""
        weights = [parameter.detach().clone() for parameter in self.model.parameters()]
        former = [
            {p: {key: value.clone() for key, value in state.items()} for p, state in optimizer.state.items()}
            for optimizer in self.optimizers
        ]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._clear()
                self._update(self.values)
        torch.cuda.current_stream().wait_stream(side)
        self._clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._update(self.values)
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), weights)
            for optimizer, states in zip(self.optimizers, former, strict=True):
                for parameter, state in optimizer.state.items():
                    for key, value in state.items():
                        value.copy_(states[parameter][key]) if parameter in states else value.zero_()
        return graph


class Checkpoint:
    """The model, its average, and the optimizers, as one file."""

    def __init__(self, file: Path, model: nn.Module, average: nn.Module, found: list[torch.optim.Optimizer]) -> None:
        self.file, self.modules, self.optimizers = file, {"model": model, "average": average}, found

    def save(self, step: int) -> None:
        tensors = {"step": torch.tensor(step)}
        for name, module in self.modules.items():
            tensors.update({f"{name}/{key}": value for key, value in module.state_dict().items()})
        for place, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors.update({f"optimizer/{place}/{index}/{key}": torch.as_tensor(v) for key, v in state.items()})
        write(tensors, self.file)

    def load(self) -> int:
        if not self.file.exists():
            return 0
        tensors = load_file(self.file)
        for name, module in self.modules.items():
            prefix = f"{name}/"
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for place, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Any]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer/{place}/"):
                    index, name = key.split("/")[2:]
                    state.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return int(tensors["step"])


def batches(data: Data, batch: int, first: int, steps: int) -> Iterator[tuple[Tensor, ...]]:
    """(clean, noise, sigmas, given, text) for each step, this rank's share; the batch depends only on the number."""
    for step in range(first, steps):
        generator = torch.Generator(DEVICE).manual_seed(step)
        picked = torch.randint(len(data.latents), (batch,), generator=generator, device=DEVICE)
        clean = data.latents[picked].float()
        noise = torch.randn(clean.shape, generator=generator, device=DEVICE)
        sigmas = sample_sigmas(batch, shift=parts.FLOW_SHIFT, generator=generator)
        chance = torch.rand(2, batch, generator=generator, device=DEVICE)
        caption = torch.where(chance[0] < 0.1, data.empty, data.caption[picked])
        share = slice(RANK, None, RANKS)
        yield clean[share], noise[share], sigmas[share], chance[1][share] < 0.6, data.text(caption[share])


def train_transformer(
    work: Path,
    name: str,
    *,
    size: str,
    steps: int,
    seconds: float,
    batch: int,
    rate: float,
    optimizer: str,
    start: Path | None,
    commit: str | None,
) -> None:
    """Goes on from WORK's checkpoint if there is one, and else from the weights of the pipeline `start`, if given."""
    data = Data(work)
    torch.manual_seed(0)
    model, average = parts.build_transformer(size), parts.build_transformer(size).to(DEVICE).eval()
    if start is not None:
        model.load_state_dict(weights_of(start, "transformer"))
    model.to(DEVICE)
    average.load_state_dict(model.state_dict())
    average.requires_grad_(False)
    found = optimizers(model, optimizer, rate)
    checkpoint = Checkpoint(work / f"{name}.safetensors", model, average, found)
    started, first = time.time(), checkpoint.load()
    if DEVICE.type == "cuda":
        compile_blocks(model, fullgraph=True)
        compile_blocks(average, fullgraph=True)
    replica = data_parallel(model)
    sums, last = torch.zeros((), device=DEVICE), (time.time(), first)
    log = open(work / f"{name}.jsonl", "a")  # noqa: SIM115
    how = {"size": size, "steps": steps, "batch": batch, "rate": rate, "optimizer": optimizer, "ranks": RANKS}
    how["latents"] = list(data.latents.shape)
    how["started_from_a_pipeline"] = start is not None
    if RANK == 0:
        log.write(json.dumps({"begin": first, **how, **machine(commit)}) + "\n")

    def evaluate(step: int) -> None:
        losses = {key: round(value, 5) for key, value in held_out_loss(average, data, batch).items()}
        log.write(json.dumps({"step": step, **losses}) + "\n")
        log.flush()
        print(f"{name} step {step} {time.time() - started:.0f} s held-out {losses}", flush=True)

    step, update = first, None
    for step, values in enumerate(batches(data, batch, first, steps), first):
        if update is None:
            update = Step(replica, found, values, graphed=DEVICE.type == "cuda" and RANKS == 1 and optimizer == "adamw")
        loss = update(values, rate_at(step, steps))
        decay = min(0.9995, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        sums += loss
        done = step + 1
        if RANK == 0 and (done % 200 == 0 or done == first + 20):
            value = sums.item() / (done - last[1])
            pace = (time.time() - last[0]) / (done - last[1])
            sums.zero_()
            last = (time.time(), done)
            print(f"{name} step {done} {time.time() - started:.0f} s loss {value:.4f} {1000 * pace:.0f} ms", flush=True)
        if RANK == 0 and done % 1000 == 0:
            evaluate(done)
        if first_rank_says(time.time() - started) > seconds:
            break
    if RANK:
        return
    torch.cuda.synchronize() if DEVICE.type == "cuda" else None
    checkpoint.save(step + 1)
    evaluate(step + 1)
