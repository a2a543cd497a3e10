"""ResNet-50 (He et al. 2016, table 1): four stages of bottleneck blocks, without torchvision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

GLOBAL_BATCH_SIZE = 256


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != 4 * width:
            self.shortcut = nn.Sequential(conv(inputs, 4 * width, 1, stride), nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


def stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (Bottleneck(4 * width, width, 1) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(inputs, width, stride), *rest)


class ResNet(nn.Module):
    def __init__(
        self, blocks: tuple[int, int, int, int] = (3, 4, 6, 3), width: int = 64, classes: int = 1000
    ) -> None:
        super().__init__()
        self.stem, self.stem_norm = conv(3, width, 7, 2), nn.BatchNorm2d(width)
        self.stage1 = stage(width, width, blocks[0], 1)
        self.stage2 = stage(4 * width, 2 * width, blocks[1], 2)
        self.stage3 = stage(8 * width, 4 * width, blocks[2], 2)
        self.stage4 = stage(16 * width, 8 * width, blocks[3], 2)
        self.head = nn.Linear(32 * width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(images))), 3, stride=2, padding=1)
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        return self.head(x.mean(dim=(2, 3)))


def build_model() -> nn.Module:
    return ResNet()


def example_batch(micro_batch_size: int, seq_len: int) -> tuple[torch.Tensor]:
    del seq_len  # images have none
    return (torch.empty(micro_batch_size, 3, 224, 224),)
