"""EfficientNet-Lite of released weights: BatchNorm at its stored statistics, merged into the convolution before it.

Its last stages can be trained while those below stay as they are, and so what they make of an image.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

#: Of the first block of each stage.
STRIDES = (1, 2, 2, 2, 1, 2, 1)
_EPS = 1e-3  # of every BatchNorm

State = Mapping[str, torch.Tensor]


class HalvingConv2d(nn.Conv2d):
    """A convolution of stride 2 with TensorFlow's padding: what is odd of it goes to the right and below."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `(B, C, H, W)` to `(B, out, ceil(H / 2), ceil(W / 2))`."""
        margins = []
        for side in (x.shape[3], x.shape[2]):
            margin = max((-(-side // 2) - 1) * 2 + self.kernel_size[0] - side, 0)
            margins += [margin // 2, margin - margin // 2]
        return F.conv2d(F.pad(x, margins), self.weight, self.bias, 2, groups=self.groups)


def merged(state: State, conv: str, norm: str, stride: int = 1) -> nn.Conv2d:
    """Returns a convolution without bias and the BatchNorm after it as one convolution.

    PEFT makes factors of the type of what it adapts, with the arguments of `nn.Conv2d`: those of stride 1 are no more.
    """
    weight = state[f"{conv}.weight"]  # (out, in / groups, k, k)
    scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + _EPS).sqrt()
    outputs, inputs, k, _ = weight.shape
    groups = outputs if inputs == 1 else 1
    kind = HalvingConv2d if stride == 2 else nn.Conv2d
    module = kind(inputs * groups, outputs, k, stride, k // 2, groups=groups)
    with torch.no_grad():
        module.weight.copy_(weight * scale.view(-1, 1, 1, 1))
        assert module.bias is not None
        module.bias.copy_(state[f"{norm}.bias"] - scale * state[f"{norm}.running_mean"])
    return module


class LiteBlock(nn.Module):
    """A wide depthwise convolution between two of 1 x 1, beside a shortcut where the shape stays."""

    def __init__(self, state: State, name: str, stride: int) -> None:
        super().__init__()
        wider = f"{name}._bn0.weight" in state
        self.expand = merged(state, f"{name}._expand_conv", f"{name}._bn0") if wider else None
        self.depthwise = merged(state, f"{name}._depthwise_conv", f"{name}._bn1", stride)
        self.project = merged(state, f"{name}._project_conv", f"{name}._bn2")
        inputs = self.depthwise.in_channels if self.expand is None else self.expand.in_channels
        self.shortcut = stride == 1 and inputs == self.project.out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `(B, inputs, H, W)` to `(B, outputs, H / stride, W / stride)`."""
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.shortcut else y


class LiteTop(nn.Module):
    """The last blocks, a convolution of 1 x 1, the mean over pixels, and a linear classifier."""

    def __init__(self, state: State, blocks: list[LiteBlock]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.last = merged(state, "_conv_head", "_bn1")
        classes, inputs = state["_fc.weight"].shape
        self.classifier = nn.Linear(inputs, classes)
        self.classifier.load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `(B, C, H, W)`, what the stages below make of images, to logits `(B, classes)`."""
        x = self.blocks(x.contiguous(memory_format=torch.channels_last))
        return self.classifier(F.relu6(self.last(x)).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Lite(nn.Module):
    """An EfficientNet-Lite: `below`, the stages that stay as they are, and `top`, the last ones.

    Args:
        state (`Mapping[str, torch.Tensor]`): Released weights, whose names and shapes say all but the strides.
        stages (`int`, *optional*, defaults to 2): Of the seven, those in `top`.
    """

    def __init__(self, state: State, stages: int = 2) -> None:
        super().__init__()
        blocks: list[LiteBlock] = []
        first: list[int] = []  # block of each stage
        outputs = 0
        while f"_blocks.{len(blocks)}._project_conv.weight" in state:
            name, before = f"_blocks.{len(blocks)}", outputs
            outputs = len(state[f"{name}._project_conv.weight"])  # differs from stage to stage
            if outputs != before:
                first.append(len(blocks))
            blocks.append(LiteBlock(state, name, STRIDES[len(first) - 1] if outputs != before else 1))
        cut = first[-stages]
        self.below = nn.Sequential(merged(state, "_conv_stem", "_bn0", 2), nn.ReLU6(), *blocks[:cut])
        self.top = LiteTop(state, blocks[cut:])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images `(B, 3, H, W)`, by [`lite_pixels`], to logits `(B, classes)`."""
        return self.top(self.below(images))  # type: ignore[no-any-return]


def lite_pixels(images: torch.Tensor, side: int) -> torch.Tensor:
    """Maps uint8 images `(B, 3, H, W)` to `(B, 3, side, side)`, in the range that the weights were trained with."""
    larger = F.interpolate(images.float(), size=side, mode="bicubic", align_corners=False)
    return (larger - 127) / 128
