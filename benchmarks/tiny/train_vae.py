"""The tiny model's VAE, and the latents of all clips."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import MethodType

import model as parts
import torch
from common import (
    DEVICE,
    RANK,
    RANKS,
    autocast,
    data_parallel,
    first_rank_says,
    machine,
    mirrored,
    read_clips,
    to_video,
    write,
)
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


def lighten(vae: nn.Module) -> None:
    """Makes the VAE cheaper to train: its norms move two bytes a value instead of four, and nothing is dropped out.

    Autocast would run diffusers' `WanRMS_norm` in float32, and with it all that follows up to the next convolution.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock, WanRMS_norm

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
        with torch.autocast(x.device.type, enabled=False):
            return x * (self.scale / length).to(x.dtype) * self.gamma.to(x.dtype)

    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, WanRMS_norm):
            module.forward = MethodType(norm, module)
        elif isinstance(module, WanResidualBlock):
            module.dropout = nn.Identity()


def train_vae(work: Path, *, seconds: float, batch: int, commit: str | None) -> None:
    """Trains on whole clips: a decoder that has seen 17 frames at most lets colors drift in those that follow.

    Under torchrun, `batch` is that of each process.
    """
    torch.manual_seed(RANK)
    clips, _ = read_clips(work / "clips" / "train")
    clips = torch.from_numpy(clips).to(DEVICE)
    held_out = torch.from_numpy(read_clips(work / "clips" / "held-out")[0][::8][:16])
    vae = parts.build_vae().to(DEVICE)
    lighten(vae)
    model = data_parallel(Reconstruction(vae))
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=DEVICE.type == "cuda"
    )
    average = {name: value.clone() for name, value in vae.state_dict().items()}
    generator = torch.Generator().manual_seed(1 + RANK)
    started, step = time.time(), 0
    while (elapsed := first_rank_says(time.time() - started)) < seconds:
        rate = min(1.0, (step + 1) / 100) * max(0.02, min(1.0, 2 * (1 - elapsed / seconds)))
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * rate
        video = to_video(clips[torch.randint(len(clips), (batch,), generator=generator).to(DEVICE)])
        if step % 2:
            video = video.flip(-1)
        loss, kl = model(video)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), list(vae.state_dict().values()), 1 - decay)
        step += 1
        if RANK == 0 and (step % 100 == 0 or step == 5):
            print(
                f"vae step {step} {elapsed:.0f} s loss {loss.item():.4f} kl {kl.item():.2f} norm {norm.item():.2f}",
                flush=True,
            )
    if RANK:
        return
    vae = parts.build_vae().to(DEVICE)  # as whoever loads it runs it
    vae.load_state_dict(average)
    errors = []  # of each frame
    with torch.no_grad(), autocast():
        for clip in held_out:
            video = to_video(clip[None])
            output = parts.decode(vae, parts.encode(vae, video).chunk(2, 1)[0].float()).float().clamp(-1, 1)
            errors.append((output - video).square().mean((0, 1, 3, 4)).double().cpu() / 4)
    by_frame = torch.stack(errors).mean(0)
    psnr = -10 * math.log10(by_frame.mean())
    print(f"vae: {step} steps, held-out PSNR {psnr:.2f} dB", flush=True)
    write({name: value.float() for name, value in vae.state_dict().items()}, work / "vae.safetensors")
    found = {"psnr": psnr, "psnr_by_frame": (-10 * by_frame.log10()).tolist()}
    how = {"steps": step, "batch": batch * RANKS, "seconds": seconds}
    (work / "vae.json").write_text(json.dumps({**how, **found, **machine(commit)}))


@torch.no_grad()
def write_latents(work: Path) -> None:
    vae = parts.build_vae().to(DEVICE).eval()
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    tensors, captions = {}, {}
    for part in ("train", "held-out"):
        clips, captions[part] = read_clips(work / "clips" / part)
        for name, flip in (("", False), ("-mirrored", True)):
            found = []
            for start in range(0, len(clips), 8):
                video = to_video(torch.from_numpy(clips[start : start + 8]))
                with autocast():
                    moments = parts.encode(vae, video.flip(-1) if flip else video)
                found.append(moments.float().chunk(2, 1)[0])
            tensors[part + name] = torch.cat(found)
            captions[part + name] = [mirrored(text) if flip else text for text in captions[part]]
            print(part + name, tuple(tensors[part + name].shape), flush=True)
    train = tensors["train"]
    mean, std = train.mean((0, 2, 3, 4)), train.std((0, 2, 3, 4))
    shape = (1, -1, 1, 1, 1)
    tensors = {k: ((v - mean.view(shape)) / std.view(shape)).bfloat16().cpu() for k, v in tensors.items()}
    texts = sorted({text for found in captions.values() for text in found} | {""})
    words = parts.vocabulary(texts)
    tokenizer, encoder = parts.build_tokenizer(words), parts.build_text_encoder(words).to(DEVICE)
    embedded = []
    for text in texts:
        ids = tokenizer([text], return_tensors="pt").input_ids.to(DEVICE)
        embedded.append(F.pad(encoder(ids).last_hidden_state[0], (0, 0, 0, 64 - ids.shape[1])))
    write({**tensors, "texts": torch.stack(embedded).cpu()}, work / "latents.safetensors")
    facts = {"mean": mean.tolist(), "std": std.tolist(), "words": words, "texts": texts, "captions": captions}
    (work / "latents.json").write_text(json.dumps(facts))
    print("std", [round(x, 2) for x in std.tolist()], len(texts), "captions", len(words), "words")
