"""CIFAR-10 for the recipes: uint8 images and labels as tensors, and endless batches with random crops and flips.

>>> from recipes.cifar_data import load_cifar
>>> images, labels = load_cifar("embedded", "train", rows=5)
>>> images.shape, labels.tolist()
(torch.Size([5, 3, 32, 32]), [4, 9, 3, 0, 3])
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

SPLITS = ("train", "test")
CLASSES = 10
# Of the training split, each channel in [0, 1].
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)


def load_cifar(
    data: str, split: str, rows: int | None = None, classes: Collection[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the images and labels of a split.

    Args:
        data (`str`): `"embedded"` (generated images of ten classes, no download), `"hub"` (the Hugging Face Hub's
            uoft-cs/cifar10), or a folder with train.parquet and test.parquet, columns `img` (as datasets stores
            images) and `label`.
        split (`str`): `"train"` or `"test"`.
        rows (`int`, *optional*): The first so many rows.
        classes (`Collection[int]`, *optional*): Only rows with these labels, which keep their numbers.

    Returns:
        Images of shape `(N, 3, 32, 32)`, uint8, and labels of shape `(N,)`, int64.

    Raises:
        `FileNotFoundError`, `ValueError`: a file is missing, lacks a column, has no rows, an image that is not
            32 x 32 RGB, or a label that is not in 0 to 9.
    """
    if split not in SPLITS:
        raise ValueError(f"the split is {split!r}, expected one of {', '.join(SPLITS)}")
    if rows is not None and rows < 1:
        raise ValueError(f"rows is {rows}, expected at least 1, or None for all")
    kept = set(range(CLASSES) if classes is None else classes)
    if not kept or not kept <= set(range(CLASSES)):
        raise ValueError(f"classes are {sorted(kept)}, expected some of 0 to {CLASSES - 1}")
    if data == "embedded":
        images, labels = generate(split, rows if classes is None else None)
        chosen = torch.isin(labels, torch.tensor(sorted(kept)))
        return images[chosen][:rows], labels[chosen][:rows]
    encoded, found, where = _from_hub(split) if data == "hub" else _from_folder(data, split)
    for index, label in enumerate(found):
        if not isinstance(label, int) or not 0 <= label < CLASSES:
            raise ValueError(
                f"{where} has the label {label!r} in row {index}, expected an integer from 0 to {CLASSES - 1}; give "
                "CIFAR-10, or number the classes so"
            )
    chosen_rows = [index for index, label in enumerate(found) if label in kept][:rows]
    if not chosen_rows:
        raise ValueError(f"{where} has no rows with a label in {sorted(kept)}; expected at least one")
    images = _decode([encoded[index] for index in chosen_rows], chosen_rows, where)
    return images, torch.tensor([found[index] for index in chosen_rows])


def _from_hub(split: str) -> tuple[Sequence[Any], Sequence[Any], str]:
    from datasets import Image, load_dataset

    loaded = load_dataset("uoft-cs/cifar10", split=split).cast_column("img", Image(decode=False))
    return list(loaded["img"]), list(loaded["label"]), "the Hub's uoft-cs/cifar10"


def _from_folder(folder: str, split: str) -> tuple[Sequence[Any], Sequence[Any], str]:
    import pyarrow
    from pyarrow import parquet

    path = Path(folder) / f"{split}.parquet"
    if not path.is_file():
        raise FileNotFoundError(
            f"--data {folder}: looked for {path} and found no such file; give embedded, hub, or a folder with "
            + " and ".join(f"{name}.parquet" for name in SPLITS)
        )
    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file ({error}); restore it from its source") from error
    missing = [name for name in ("img", "label") if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{path} has the columns {table.column_names}, and lacks {missing[0]!r}; expected 'img' and 'label'"
        )
    return table["img"].to_pylist(), table["label"].to_pylist(), str(path)


def _decode(encoded: Sequence[Any], rows: Sequence[int], where: str) -> torch.Tensor:
    """Maps N encoded images (bytes, or `{"bytes": ...}` as datasets has) to `(N, 3, 32, 32)`, uint8."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    images = np.empty((len(encoded), 32, 32, 3), dtype=np.uint8)
    for index, (entry, row) in enumerate(zip(encoded, rows, strict=True)):
        content = entry.get("bytes") if isinstance(entry, dict) else entry
        if not isinstance(content, bytes):
            raise ValueError(
                f"{where} holds a {type(content).__name__} as the image of row {row}, expected the bytes of a PNG or "
                "JPEG file; store the files themselves, not their paths"
            )
        try:
            with Image.open(io.BytesIO(content)) as image:
                size, mode = image.size, image.mode
                if size == (32, 32) and mode == "RGB":
                    images[index] = np.asarray(image)
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(
                f"{where} has an image in row {row} that cannot be read ({error}); restore it from its source"
            ) from error
        if size != (32, 32) or mode != "RGB":
            raise ValueError(
                f"{where} has an image of {size[0]} x {size[1]} pixels in mode {mode} in row {row}, expected 32 x 32 "
                "in mode RGB; resize and convert the images first"
            )
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


# Embedded images


def generate(split: str, rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws bright and dark figures of five shapes; class = shape + 5 * (figure is bluer than its ground).

    Every class looks the same in a mirror, so that flips keep the label. Fewer rows are the first of more rows.

    Returns:
        Images of shape `(N, 3, 32, 32)`, uint8, and labels of shape `(N,)`, int64; N is 20,000 for training and 4,000
        for the test by default.
    """
    rows = rows or (20_000 if split == "train" else 4_000)
    blocks = [_block(SPLITS.index(split) * 1_000_003 + block) for block in range(-(-rows // 1000))]
    images, labels = (torch.cat(parts)[:rows] for parts in zip(*blocks, strict=True))
    return images, labels


def _block(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns 1,000 images of shape `(1000, 3, 32, 32)`, uint8, and labels of shape `(1000,)`."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(1000, *shape, generator=generator)

    labels = torch.randint(CLASSES, (1000,), generator=generator)
    axis = torch.linspace(-1, 1, 32)
    y = (axis.view(1, 32, 1) - uniform(-0.3, 0.3, 1, 1)).abs()  # (1000, 32, 1), distance from the figure's centre
    x = (axis.view(1, 1, 32) - uniform(-0.3, 0.3, 1, 1)).abs()  # (1000, 1, 32)
    r = uniform(0.4, 0.7, 1, 1)  # radius
    distance, nearer, farther = (x**2 + y**2).sqrt(), torch.minimum(x, y), torch.maximum(x, y)
    shapes = torch.stack(
        [
            distance < r,  # disc
            (distance - 0.8 * r).abs() < 0.2 * r,  # ring
            farther < 0.85 * r,  # square
            (nearer < 0.25 * r) & (farther < r),  # upright cross
            ((x - y).abs() < 0.35 * r) & (farther < r),  # slanted cross
        ]
    )  # (5, 1000, 32, 32)
    figure = shapes[labels % 5, torch.arange(1000)].unsqueeze(1)  # (1000, 1, 32, 32)
    bluer = torch.where(labels < 5, -1.0, 1.0).view(-1, 1, 1, 1)
    contrast = bluer * torch.tensor([-25.0, 0.0, 25.0]).view(3, 1, 1)  # (1000, 3, 1, 1)
    ground = 128 - contrast + uniform(-60, 60, 3, 1, 1)
    ink = 128 + contrast + uniform(-60, 60, 3, 1, 1)
    noise = 30 * torch.randn(1000, 3, 32, 32, generator=generator)
    return (torch.where(figure, ink, ground) + noise).round().clamp(0, 255).to(torch.uint8), labels


# Batches


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Maps uint8 images `(N, 3, 32, 32)` to floats of that shape, by CIFAR-10's mean and standard deviation."""
    return (images.float() / 255 - MEAN.to(images.device)) / STD.to(images.device)


def crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Moves each of the images `(B, 3, 32, 32)` by up to 4 pixels, with black around it, and mirrors half of them."""
    count, device = len(images), images.device
    top, left = torch.randint(0, 9, (2, count, 1), generator=generator)  # (B, 1) each
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    pixels = torch.arange(32).expand(count, 32)
    row = (top + pixels).to(device).view(count, 1, 32, 1)
    column = (left + torch.where(mirrored, 31 - pixels, pixels)).to(device).view(count, 1, 1, 32)
    image = torch.arange(count, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(3, device=device).view(1, 3, 1, 1)
    return F.pad(images, (4, 4, 4, 4))[image, channel, row, column]


def batches(
    images: torch.Tensor, labels: torch.Tensor, size: int, seed: int, augment: bool = True
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields shuffled batches for ever; what is left of an epoch below `size` is dropped.

    Args:
        images (`torch.Tensor` of shape `(N, 3, 32, 32)`, uint8), labels (`torch.Tensor` of shape `(N,)`): The data.
        size (`int`): B.
        seed (`int`): Of the order, the crops and the flips.
        augment (`bool`, *optional*, defaults to `True`): Random crops and flips.

    Yields:
        Normalised images of shape `(B, 3, 32, 32)`, float, and labels of shape `(B,)`.

    Raises:
        `ValueError`: there are fewer images than one batch needs.
    """
    if not 1 <= size <= len(images):
        raise ValueError(f"the batch size is {size} and there are {len(images)} images; give 1 to {len(images)}")
    generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF)
    while True:
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(images) - size + 1, size):
            chosen = order[start : start + size].to(images.device)
            x = images[chosen]
            yield normalize(crop_and_flip(x, generator) if augment else x), labels[chosen]
