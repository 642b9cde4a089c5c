"""Features of clips, and the distance between two sets of clips by them: FVD's, by a network of our own.

FVD is the Fréchet distance of features that a network for recognizing actions has. Ours reads the latents of a clip and
tells which words are in its caption: the place, how the player moves, and what is ahead. The layer before the words
gives the features. So a distance is large where a set of clips shows other places, movements, or enemies than another
one, or nothing that is like them. Its unit is that of this network: only distances of one network compare, and only of
sets of as many clips.

    python benchmarks/tiny/make.py features --work WORK --steps 1500
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from common import DEVICE, machine, write
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from train_transformer import Data

FILE, RECORD = "features.safetensors", "features.json"


class ClipFeatures(nn.Module):
    """Latents [B, channels, F, H, W] to features [B, `num_features`].

    Args:
        words: how many words it tells apart.
    """

    num_features = 64  # as torchmetrics asks for it

    def __init__(self, words: int, channels: int = 16) -> None:
        super().__init__()
        layers, widths = [], (channels, 32, 64, 128)
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv3d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.pooled = nn.Linear(widths[-1], self.num_features)
        self.words = nn.Linear(self.num_features, words)

    def forward(self, latents: Tensor) -> Tensor:
        return self.pooled(self.layers(latents.float()).mean((2, 3, 4)))

    def logits(self, latents: Tensor) -> Tensor:
        """The log-odds [B, words] that a word is in the caption."""
        return self.words(F.silu(self(latents)))


def words_of(texts: list[str]) -> tuple[list[str], Tensor]:
    """The words that some captions have and others do not, and which has which, float32 [texts, words]."""
    captions = [set(text.replace(",", " ").split()) for text in texts]
    told = [caption for caption in captions if caption]  # the empty caption says nothing
    words = sorted(set.union(*told) - set.intersection(*told))
    return words, torch.tensor([[float(word in caption) for word in words] for caption in captions])


def train_features(work: Path, *, steps: int, batch: int, rate: float, commit: str | None) -> None:
    """Trains the network on the training clips, and writes it and what it tells of held-out clips into WORK."""
    data, started = Data(work, held_out=10**6), time.time()
    words, targets = words_of(data.texts_of_captions)
    targets = targets.to(DEVICE)
    torch.manual_seed(0)
    model = ClipFeatures(len(words), data.latents.shape[1]).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        picked = torch.randint(len(data.latents), (batch,), generator=generator).to(DEVICE)
        clips = data.latents[picked].float()
        clips = clips + 0.1 * torch.randn_like(clips)
        loss = F.binary_cross_entropy_with_logits(model.logits(clips), targets[data.caption[picked]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        found = torch.cat([model.logits(clips) > 0 for clips in data.held_out.split(batch)])
    right = found == targets[data.held_out_caption].bool()
    record = {
        "steps": steps,
        "batch": batch,
        "rate": rate,
        "clips": len(data.latents),
        "held_out_clips": len(right),
        "words": words,
        "words_right": right.float().mean().item(),
        "captions_right": right.all(1).float().mean().item(),
        "seconds": round(time.time() - started, 1),
        **machine(commit),
    }
    write(model.state_dict(), work / FILE)
    (work / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    print(f"features: {record['words_right']:.3f} of words, {record['captions_right']:.3f} of captions", flush=True)


def load_features(work: Path) -> ClipFeatures:
    """The network that `train_features` wrote."""
    tensors = load_file(work / FILE)
    channels = tensors["layers.0.weight"].shape[1]
    model = ClipFeatures(tensors["words.bias"].shape[0], channels).to(DEVICE).eval()
    model.load_state_dict(tensors)
    return model


@torch.no_grad()
def frechet_distance(model: ClipFeatures, some: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """Between the features of two sets of clips, each in batches of latents [B, channels, F, H, W]."""
    metric = FrechetInceptionDistance(feature=model).to(DEVICE)
    for real, batches in ((True, some), (False, others)):
        for latents in batches:
            metric.update(latents.to(DEVICE), real=real)
    return metric.compute().item()
