"""LPIPS (Zhang et al., 2018, arXiv 1801.03924): the distance between two images in the features of AlexNet.

The network is defined here, so that `foveal eval` does not need torchvision. Each build of torchvision matches only one
build of torch, and diffusers cannot be imported next to one that does not match.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# `torch.hub` and torchvision both name the downloaded file after this address.
ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
# Mean and standard deviation of ImageNet's pixels, for images in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def alexnet_file() -> Path:
    """Where `torch.hub` and torchvision keep AlexNet's weights after a download."""
    return Path(torch.hub.get_dir(), "checkpoints", ALEXNET_URL.rpartition("/")[2])


def linear_file() -> Path:
    """The learned weights of the channels, which are part of torchmetrics.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    import torchmetrics

    return Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth"


def alexnet_features() -> nn.Sequential:
    """The convolutions of AlexNet (arXiv 1404.5997), numbered as in torchvision's state dicts."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


class LPIPS(nn.Module):
    """The distance, with the weights of the two files above.

    Args:
        alexnet: the state dict of AlexNet, with "features.0.weight" and so on.
        linear: one weight per channel for each of the five activations, "lin0.model.1.weight" [1, C, 1, 1] and so on.
    """

    def __init__(self, alexnet: dict[str, Tensor], linear: dict[str, Tensor]) -> None:
        super().__init__()
        self.features = alexnet_features()
        prefix = "features."
        self.features.load_state_dict({k.removeprefix(prefix): v for k, v in alexnet.items() if k.startswith(prefix)})
        for layer in range(5):
            self.register_buffer(f"linear_{layer}", linear[f"lin{layer}.model.1.weight"])
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def activations(self, images: Tensor) -> list[Tensor]:
        """The outputs of the five rectifiers: [N, 64, H1, W1], [N, 192, H2, W2], and so on."""
        x, found = (images - self.shift) / self.scale, []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x)
        return found

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """Distances [N] of images [N, 3, H, W] in [-1, 1]."""
        total = images.new_zeros(len(images))
        for layer, (a, b) in enumerate(zip(self.activations(images), self.activations(reference), strict=True)):
            difference = (_unit(a) - _unit(b)).square()
            total += F.conv2d(difference, getattr(self, f"linear_{layer}")).mean((1, 2, 3))
        return total


def _unit(features: Tensor) -> Tensor:
    """Features [N, C, H, W], normalized over the channels to length 1."""
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()
