"""The residual networks for small images of He et al. (2015), section 4.2: no model of timm's, made of timm's blocks.

Three stages of `blocks` basic blocks, 16, 32 and 64 wide; a 3x3 convolution of stride 1 and no pooling in front.
Between stages the shortcut keeps every second pixel and pads with channels of zeros (the paper's option A). Here it is
a 1x1 convolution of stride 2 whose weights say the same, so that it merges like any other operator.
"""

from __future__ import annotations

import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn


class CifarResNet(nn.Module):
    """A network of ``6 * blocks + 2`` layers: 3 are ResNet-20, 9 are ResNet-56.

    Args:
        blocks: of each stage.
        num_classes: outputs of the head.
        width: channels of the first stage; each stage has twice those of the one before.
    """

    def __init__(self, blocks: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks)
        self.layer2 = _stage(width, 2 * width, blocks)
        self.layer3 = _stage(2 * width, 4 * width, blocks)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def cifar_resnet(blocks: int = 9, num_classes: int = 10, width: int = 16) -> nn.Module:
    """What a spec names: ``model: {python: cifar_resnet:cifar_resnet, blocks: 9}``."""
    return CifarResNet(blocks, num_classes, width)


def _stage(before: int, width: int, blocks: int) -> nn.Sequential:
    if before == width:
        return nn.Sequential(*[BasicBlock(width, width) for _ in range(blocks)])
    first = BasicBlock(before, width, stride=2, downsample=_option_a(before, width))
    return nn.Sequential(first, *[BasicBlock(width, width) for _ in range(blocks - 1)])


def _option_a(before: int, width: int) -> nn.Sequential:
    """Every second pixel; the channels in the middle of as many more."""
    conv = nn.Conv2d(before, width, 1, stride=2, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        for channel in range(before):
            conv.weight[(width - before) // 2 + channel, channel] = 1
    return nn.Sequential(conv, nn.BatchNorm2d(width))
