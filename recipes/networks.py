"""Networks for 32 x 32 images: CIFAR's ResNet-8, -20 and -18, and a small ViT of transformers.

All map images of shape `(B, 3, 32, 32)`, float, to logits of shape `(B, num_classes)`.

>>> from recipes.networks import resnet8
>>> sum(p.numel() for p in resnet8().parameters())
75290
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification


class PaddedShortcut(nn.Module):
    """Shortcut without weights: every second pixel, zeros for the new channels (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.new = outputs - inputs  # channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `(B, inputs, H, W)` to `(B, outputs, H / 2, W / 2)`."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `(B, inputs, H, W)` to `(B, outputs, H / stride, W / stride)`."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, stages of blocks that halve the image from the second stage on, the mean over pixels, a linear head.

    Args:
        widths (`tuple[int, ...]`): Channels of each stage.
        blocks (`int`): Blocks of each stage.
        num_classes (`int`): Size of the head.
        projected (`bool`): Shortcuts are 1 x 1 convolutions where the shape changes (option B), else they have no
            weights (option A).
    """

    def __init__(self, widths: tuple[int, ...], blocks: int, num_classes: int, projected: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        layers: list[nn.Module] = []
        channels = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                shortcut: nn.Module = nn.Identity()
                if stride == 2 and projected:
                    conv = nn.Conv2d(channels, width, 1, stride=2, bias=False)
                    shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))
                elif stride == 2:
                    shortcut = PaddedShortcut(channels, width)
                layers.append(Block(channels, width, stride, shortcut))
                channels = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images `(B, 3, 32, 32)` to logits `(B, num_classes)`."""
        x = self.layers(F.relu(self.norm(self.conv(images))))
        return self.head(x.mean(dim=(2, 3)))


def resnet8(num_classes: int = 10) -> nn.Module:
    """Returns a ResNet of 6n + 2 layers with n = 1 (He et al. 2016): `(B, 3, 32, 32)` to `(B, num_classes)`."""
    return ResNet((16, 32, 64), 1, num_classes, projected=False)


def resnet20(num_classes: int = 10) -> nn.Module:
    """Returns a ResNet of 6n + 2 layers with n = 3 (He et al. 2016): `(B, 3, 32, 32)` to `(B, num_classes)`."""
    return ResNet((16, 32, 64), 3, num_classes, projected=False)


def resnet18(num_classes: int = 10) -> nn.Module:
    """Returns ResNet-18 with a 3 x 3 stem and no pooling after it: `(B, 3, 32, 32)` to `(B, num_classes)`."""
    return ResNet((64, 128, 256, 512), 2, num_classes, projected=True)


class SmallViT(nn.Module):
    """`ViTForImageClassification` that returns its logits."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.vit = ViTForImageClassification(config)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images `(B, 3, 32, 32)` to logits `(B, num_classes)`."""
        return self.vit(pixel_values=images).logits


def small_vit(num_classes: int = 10, width: int = 64, layers: int = 4, heads: int = 4) -> nn.Module:
    """Returns a ViT of 4 x 4 patches without dropout: `(B, 3, 32, 32)` to `(B, num_classes)`.

    Args:
        num_classes (`int`, *optional*, defaults to 10): Size of the head.
        width (`int`, *optional*, defaults to 64): Size of a token; the hidden layer of an MLP has twice as many.
        layers, heads (`int`, *optional*, default to 4): Of the encoder.
    """
    config = ViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=num_classes,
    )
    return SmallViT(config)
