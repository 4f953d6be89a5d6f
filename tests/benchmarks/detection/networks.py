"""The victims: networks that every attack is planted in, as factories for `--arch`; for 32 px unless they say so.

Pixels in [0, 1] are normalised outside, as `cdclean scan --mean --std` does: those of CIFAR-10 by MEAN and STD.
"""

from __future__ import annotations

import timm
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10's training pixels, per channel
STD = (0.2470, 0.2435, 0.2616)

# timm would have some networks see the middle of an enlarged image; victims learn and are scanned on all of it.
_WHOLE = {"crop_pct": 1.0}


class Basic(nn.Module):
    """Two 3x3 convolutions with batch norm, and a projected shortcut where the shape changes (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        changes = stride != 1 or inputs != outputs
        self.shortcut: nn.Module = nn.Identity()
        if changes:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """A ResNet with a CIFAR stem: `blocks` basic blocks in each of four stages of `width` times 1, 2, 4, 8."""

    def __init__(self, blocks: int, width: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        inputs = width
        for stage in range(4):
            outputs = width * 2**stage
            layers = []
            for block in range(blocks):
                layers.append(Basic(inputs, outputs, 2 if stage and not block else 1))
                inputs = outputs
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def tiny_resnet(num_classes: int = 10) -> nn.Module:
    """0.3 million parameters."""
    return CifarResNet(1, 16, num_classes)


def small_resnet(num_classes: int = 10) -> nn.Module:
    """1.2 million parameters."""
    return CifarResNet(1, 32, num_classes)


def resnet18(num_classes: int = 10) -> nn.Module:
    """ResNet-18 with a CIFAR stem, 11.2 million parameters."""
    return CifarResNet(2, 64, num_classes)


class Vgg(nn.Module):
    """VGG-13 with batch norm for 32 px (Simonyan & Zisserman 2015), one linear layer."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for outputs in (64, 128, 256, 512, 512):
            for _ in range(2):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).flatten(1))  # type: ignore[no-any-return]


def vgg13(num_classes: int = 10) -> nn.Module:
    return Vgg(num_classes)


def mobilenet_v2(num_classes: int = 10) -> nn.Module:
    """timm's, with the stem and the first stages at full resolution, since images are small."""
    network = timm.create_model("mobilenetv2_100", num_classes=num_classes, pretrained_cfg_overlay=_WHOLE)
    network.conv_stem.stride = (1, 1)  # type: ignore[union-attr, assignment]
    network.blocks[1][0].conv_dw.stride = (1, 1)  # type: ignore[index, union-attr]
    return network


def small_vit(num_classes: int = 10) -> nn.Module:
    """A vision transformer of six layers and 192 dimensions, for patches of 4 px."""
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        depth=6,
        num_classes=num_classes,
        drop_path_rate=0.0,
        pretrained_cfg_overlay=_WHOLE,
    )


def timm_resnet18(num_classes: int = 16) -> nn.Module:
    """timm's ResNet-18, for 224 px, 11.2 million parameters."""
    return timm.create_model("resnet18", num_classes=num_classes, pretrained_cfg_overlay=_WHOLE)
