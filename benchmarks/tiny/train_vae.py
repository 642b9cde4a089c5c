"""The tiny model's VAE, and the latents of all clips."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import MethodType

import model as parts
import torch
from common import DEVICE, autocast, machine, mirrored, read_ahead, read_clips, to_video, weights_of, write
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


def reconstruction_loss(output: Tensor, video: Tensor) -> Tensor:
    """Absolute error of pixels, of their differences in space and time, and of the video at half and quarter size."""
    error = output - video
    loss = error.abs().mean()
    for axis in (2, 3, 4):
        loss = loss + 0.5 * error.diff(dim=axis).abs().mean()
    for size in (2, 4):
        loss = loss + 0.5 * F.avg_pool3d(error, (1, size, size)).abs().mean()
    return loss


CLIP_PIXELS = 32 * 49 * 144 * 256  # that the encoder takes at once
CROP = (72, 128)  # pixels of what a training step sees of a clip


class Reconstruction(nn.Module):
    """The loss of a VAE and its Kullback-Leibler part for a video [B, 3, F, H, W]."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        with autocast():
            mean, logvar = parts.encode(self.vae, video).float().chunk(2, 1)
            logvar = logvar.clamp(-30, 20)
            latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
            output = parts.decode(self.vae, latents)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(output.float(), video) + 3e-4 * kl, kl.detach()


def normalize_and_activate(x: Tensor, gamma: Tensor) -> Tensor:
    """SiLU of diffusers' `WanRMS_norm`, with the norm in float32 and two bytes a value read and written."""
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(1e-12)
    return F.silu(wide * (x.shape[1] ** 0.5 / length) * gamma).to(x.dtype)


def lighten(vae: nn.Module) -> None:
    """Makes the VAE cheaper to train, with the same values up to rounding: most of its time is not convolutions.

    A norm and its activation are one compiled kernel instead of eight, nothing is upsampled in float32, convolutions
    have their channels last, and dropout, whose rate is zero, is left out.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock, WanRMS_norm, WanUpsample

    fused = normalize_and_activate
    if DEVICE.type == "cuda":
        fused = torch.compile(fused, dynamic=True)

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        return fused(x, self.gamma)

    def upsample(self: nn.Module, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=self.scale_factor, mode=self.mode)

    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
        elif isinstance(module, WanUpsample):
            module.forward = MethodType(upsample, module)
        elif isinstance(module, WanResidualBlock):
            module.dropout = nn.Identity()
        if hasattr(module, "nonlinearity"):
            module.nonlinearity = nn.Identity()
            for child in module.children():
                if isinstance(child, WanRMS_norm):
                    child.forward = MethodType(norm, child)


class Trainer:
    """A VAE with its optimizer and its average. A step on a GPU is one CUDA graph.

    Launched one by one, the 3,000 kernels of a step take the host 110 ms and the GPU 20 ms. Parameters that require no
    gradient stay as they are.
    """

    def __init__(self, vae: nn.Module, shape: tuple[int, ...]) -> None:
        cuda = DEVICE.type == "cuda"
        self.vae, self.model, self.video = vae, Reconstruction(vae), torch.zeros(shape, device=DEVICE)
        self.rate = torch.tensor(0.0, device=DEVICE)
        self.trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=self.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=cuda, capturable=cuda
        )
        self.average = {name: value.clone() for name, value in vae.state_dict().items()}
        self.steps, self.graph = 0, None
        if cuda:
            self.graph = self._captured()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Warms up at a rate of zero, which leaves the weights as they are, and records a step."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._update()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._update()
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        return graph

    def _update(self) -> None:
        loss, self.kl = self.model(self.video)
        loss.backward()
        self.norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.loss = loss.detach()

    def step(self, video: Tensor, rate: float) -> None:
        self.video.copy_(video)
        self.rate.fill_(rate)
        if self.graph is None:
            self.optimizer.zero_grad(set_to_none=True)
            self._update()
        else:
            self.graph.replay()
        decay = min(0.999, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.average.values()), list(self.vae.state_dict().values()), 1 - decay)
        self.steps += 1


def crops(clips: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """uint8 [count, F, h, w, 3]: a crop of whole length of each of `count` random clips, mirrored half of the time."""
    rows, columns = ((full - part) // 8 + 1 for full, part in zip(clips.shape[2:4], CROP, strict=True))
    found = []
    for _ in range(count):
        index, row, column, mirror = (
            int(torch.randint(size, (), generator=generator)) for size in (len(clips), rows, columns, 2)
        )
        crop = clips[index, :, 8 * row :, 8 * column :][:, : CROP[0], : CROP[1]]
        found.append(crop.flip(2) if mirror else crop)
    return torch.stack(found)


def train_vae(
    work: Path,
    *,
    seconds: float,
    batch: int,
    rate: float,
    start: Path | None,
    decoder_only: bool,
    commit: str | None,
) -> None:
    """Trains on crops of whole length: a decoder that has seen 17 frames at most lets colors drift later.

    `start` is a pipeline whose VAE it goes on from. With `decoder_only` its latents stay what they are, and so a
    transformer that was trained on them stays valid.
    """
    if decoder_only and start is None:
        raise ValueError("decoder_only needs a pipeline to start from: an encoder without training is of no use")
    torch.manual_seed(0)
    clips = torch.from_numpy(read_clips(work / "clips" / "train")[0]).to(DEVICE)
    held_out = torch.from_numpy(read_clips(work / "clips" / "held-out")[0][::8][:16])
    vae = parts.build_vae()
    if start is not None:
        vae.load_state_dict(weights_of(start, "vae"))
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    vae.to(DEVICE)
    lighten(vae)
    trainer = Trainer(vae, (batch, 3, parts.FRAMES, *CROP))
    generator = torch.Generator().manual_seed(1)
    started = time.time()
    while (elapsed := time.time() - started) < seconds:
        step = trainer.steps
        share = min(1.0, (step + 1) / 200) * max(0.02, min(1.0, 2 * (1 - elapsed / seconds)))
        trainer.step(to_video(crops(clips, batch, generator)), rate * share)
        if step % 10 == 0:  # the host runs ahead of the GPU, but not of the clock
            loss, kl, norm = trainer.loss.item(), trainer.kl.item(), trainer.norm.item()
        if step % 500 == 0:
            print(f"vae step {step} {elapsed:.0f} s loss {loss:.4f} kl {kl:.2f} norm {norm:.2f}", flush=True)
    vae = parts.build_vae().to(DEVICE)  # as whoever loads it runs it
    vae.load_state_dict(trainer.average)
    errors = []  # of each frame
    with torch.no_grad(), autocast():
        for clip in held_out:
            video = to_video(clip[None])
            output = parts.decode(vae, parts.encode(vae, video).chunk(2, 1)[0].float()).float().clamp(-1, 1)
            errors.append((output - video).square().mean((0, 1, 3, 4)).double().cpu() / 4)
    by_frame = torch.stack(errors).mean(0)
    psnr = -10 * math.log10(by_frame.mean())
    print(f"vae: {trainer.steps} steps, held-out PSNR {psnr:.2f} dB", flush=True)
    write({name: value.float() for name, value in vae.state_dict().items()}, work / "vae.safetensors")
    found = {"psnr": psnr, "psnr_by_frame": (-10 * by_frame.log10()).tolist()}
    how = {
        "clips": len(clips),
        "started_from_a_pipeline": start is not None,
        "decoder_only": decoder_only,
        "steps": trainer.steps,
        "batch": batch,
        "crop": CROP,
        "rate": rate,
        "seconds": seconds,
    }
    (work / "vae.json").write_text(json.dumps({**how, **found, **machine(commit)}))


@torch.no_grad()
def write_latents(work: Path, pipeline: Path | None) -> None:
    """The latents and captions of all clips, normalized, and the embeddings of the captions.

    `pipeline` is one whose statistics, tokenizer, and text encoder count; without one they are made from the clips.
    """
    vae = parts.build_vae().to(DEVICE).eval()
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    tensors, captions = {}, {}
    for part in ("train", "held-out"):
        found: dict[str, list[Tensor]] = {"": [], "-mirrored": []}
        captions[part], captions[f"{part}-mirrored"] = [], []
        for clips, texts in read_ahead(work / "clips" / part):
            at_once = max(1, CLIP_PIXELS // math.prod(clips.shape[1:4]))
            for video in map(to_video, torch.from_numpy(clips).split(at_once)):
                for name, shown in (("", video), ("-mirrored", video.flip(-1))):
                    with autocast():
                        found[name].append(parts.encode(vae, shown).float().chunk(2, 1)[0])
            captions[part] += texts
            captions[f"{part}-mirrored"] += [mirrored(text) for text in texts]
        tensors |= {part + name: torch.cat(latents) for name, latents in found.items()}
        print(part, tuple(tensors[part].shape), flush=True)
    train = tensors["train"]
    mean, std = train.mean((0, 2, 3, 4)), train.std((0, 2, 3, 4))
    texts = sorted({text for found in captions.values() for text in found} | {""})
    words = parts.vocabulary(texts)
    if pipeline is not None:
        config = json.loads((pipeline / "vae" / "config.json").read_text())
        mean, std = (torch.tensor(config[f"latents_{name}"], device=DEVICE) for name in ("mean", "std"))
        words = json.loads((pipeline / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    shape = (1, -1, 1, 1, 1)
    tensors = {k: ((v - mean.view(shape)) / std.view(shape)).bfloat16().cpu() for k, v in tensors.items()}
    tokenizer, encoder = parts.build_tokenizer(words), parts.build_text_encoder(words)
    if pipeline is not None:
        tensors_of_text = weights_of(pipeline, "text_encoder", "model.safetensors")
        encoder.load_state_dict({**tensors_of_text, "encoder.embed_tokens.weight": tensors_of_text["shared.weight"]})
    encoder.to(DEVICE)
    embedded = []
    for text in texts:
        ids = tokenizer([text], return_tensors="pt").input_ids.to(DEVICE)
        embedded.append(F.pad(encoder(ids).last_hidden_state[0], (0, 0, 0, 64 - ids.shape[1])))
    write({**tensors, "texts": torch.stack(embedded).cpu()}, work / "latents.safetensors")
    facts = {"mean": mean.tolist(), "std": std.tolist(), "words": words, "texts": texts, "captions": captions}
    (work / "latents.json").write_text(json.dumps(facts))
    print("std", [round(x, 2) for x in std.tolist()], len(texts), "captions", len(words), "words")
