"""Networks for 32 x 32 images: CIFAR's ResNet-8, -20, -18 and VGG-16; MobileNetV2 and a small ViT of transformers.

All map images of shape `(B, 3, 32, 32)`, float, to logits of shape `(B, num_classes)`.

>>> from hf_sl2o.experiments.tasks.networks import resnet8
>>> sum(p.numel() for p in resnet8().parameters())
75290
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, ViTConfig, ViTForImageClassification


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


class VGG(nn.Module):
    """3 x 3 convolutions with BatchNorm, halved after each of five stages, and one linear head.

    Args:
        stages (`tuple[tuple[int, int], ...]`): Convolutions and channels of each stage.
        num_classes (`int`): Size of the head.
    """

    def __init__(self, stages: tuple[tuple[int, int], ...], num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for count, width in stages:
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images `(B, 3, 32, 32)` to logits `(B, num_classes)`."""
        return self.head(self.features(images).flatten(1))


def vgg16(num_classes: int = 10) -> nn.Module:
    """Returns VGG-16 with BatchNorm and one linear layer on top: `(B, 3, 32, 32)` to `(B, num_classes)`."""
    return VGG(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)), num_classes)


class MobileNet(nn.Module):
    """`MobileNetV2ForImageClassification` that returns its logits."""

    def __init__(self, config: MobileNetV2Config) -> None:
        super().__init__()
        self.mobilenet = MobileNetV2ForImageClassification(config)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images `(B, 3, H, W)` to logits `(B, num_classes)`."""
        return self.mobilenet(pixel_values=images).logits


def mobilenet_v2(num_classes: int = 10, image_size: int = 32) -> nn.Module:
    """Returns transformers' MobileNetV2: `(B, 3, S, S)` to `(B, num_classes)`.

    Below 64 pixels it halves the image three times instead of five (later strides become dilations), so that 4 x 4
    positions are left of 32 x 32.
    """
    config = MobileNetV2Config(  # type: ignore[call-arg]
        image_size=image_size,
        output_stride=8 if image_size < 64 else 32,
        tf_padding=False,
        classifier_dropout_prob=0.0,
        num_labels=num_classes,
    )
    return MobileNet(config)


class Classifier(nn.Module):
    """Gives a network of images the interface that the Trainer expects: `pixel_values`, `labels`, a loss.

    Args:
        network (`nn.Module`): Maps images to logits.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Maps images `(B, 3, H, W)` and labels `(B,)` to the mean cross-entropy and logits `(B, num_classes)`."""
        # Convolutions on CPU are a fifth faster with the channels last; the weights stay as they are.
        logits = self.network(pixel_values.contiguous(memory_format=torch.channels_last))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class SmallViT(nn.Module):
    """`ViTForImageClassification` that returns its logits."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.vit = ViTForImageClassification(config)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images `(B, 3, 32, 32)` to logits `(B, num_classes)`."""
        return self.vit(pixel_values=images).logits


def small_vit(num_classes: int = 10, width: int = 64, layers: int = 4, heads: int = 4, patch: int = 4) -> nn.Module:
    """Returns a ViT without dropout: `(B, 3, 32, 32)` to `(B, num_classes)`.

    Args:
        num_classes (`int`, *optional*, defaults to 10): Size of the head.
        width (`int`, *optional*, defaults to 64): Size of a token; the hidden layer of an MLP has twice as many.
        layers, heads (`int`, *optional*, default to 4): Of the encoder.
        patch (`int`, *optional*, defaults to 4): Pixels at the side of a patch.
    """
    config = ViTConfig(  # type: ignore[call-arg]
        image_size=32,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=num_classes,
    )
    return SmallViT(config)
