"""CIFAR-10 for the recipes: uint8 images and labels as tensors, and endless batches with random crops and flips.

>>> from hf_sl2o.experiments.data.cifar import load_cifar
>>> images, labels = load_cifar("embedded", "train", rows=5)
>>> images.shape, labels.tolist()
(torch.Size([5, 3, 32, 32]), [4, 9, 3, 0, 3])
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..command_line.flags import load_named

SPLITS = ("train", "test")
CLASSES = 10
# Of the training split, each channel in [0, 1].
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
MARGIN = 4  # pixels of black around an image, from which random crops are taken


def load_cifar(
    data: str,
    split: str,
    rows: int | None = None,
    classes: Collection[int] | None = None,
    *,
    num_classes: int = CLASSES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the images and labels of a split.

    Args:
        data (`str`): `"embedded"` (generated images of ten classes, no download), `"hub"` (the Hugging Face Hub's
            uoft-cs/cifar10 or -cifar100), or a folder with train.parquet and test.parquet, columns `img` (as datasets
            stores images) and `label`; `fine_label` for CIFAR-100.
        split (`str`): `"train"` or `"test"`.
        rows (`int`, *optional*): The first so many rows.
        classes (`Collection[int]`, *optional*): Only rows with these labels, which keep their numbers.
        num_classes (`int`, *optional*, defaults to 10): 10 or 100.

    Returns:
        Images of shape `(N, 3, 32, 32)`, uint8, and labels of shape `(N,)`, int64.

    Raises:
        `FileNotFoundError`, `ValueError`: a file is missing, lacks a column, has no rows, an image that is not
            32 x 32 RGB, or a label that is not in 0 to `num_classes` - 1.
    """
    if split not in SPLITS:
        raise ValueError(f"the split is {split!r}, expected one of {', '.join(SPLITS)}")
    if rows is not None and rows < 1:
        raise ValueError(f"rows is {rows}, expected at least 1, or None for all")
    if num_classes not in (10, 100):
        raise ValueError(f"num_classes is {num_classes}, expected 10 (CIFAR-10) or 100 (CIFAR-100)")
    kept = set(range(num_classes) if classes is None else classes)
    if not kept or not kept <= set(range(num_classes)):
        raise ValueError(f"classes are {sorted(kept)}, expected some of 0 to {num_classes - 1}")
    if data == "embedded":
        if num_classes != CLASSES:
            raise ValueError(f"the embedded images have {CLASSES} classes, not {num_classes}; give hub or a folder")
        images, labels = generate(split, rows if classes is None else None)
        chosen = torch.isin(labels, torch.tensor(sorted(kept)))
        return images[chosen][:rows], labels[chosen][:rows]
    column = "label" if num_classes == CLASSES else "fine_label"
    encoded, found, where = _from_hub(split, column) if data == "hub" else _from_folder(data, split, column)
    for index, label in enumerate(found):
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < num_classes:
            raise ValueError(
                f"{where} has the label {label!r} in row {index}, expected an integer from 0 to {num_classes - 1}; "
                f"give CIFAR-{num_classes}, or number the classes so"
            )
    chosen_rows = [index for index, label in enumerate(found) if label in kept][:rows]
    if not chosen_rows:
        raise ValueError(f"{where} has no rows with a label in {sorted(kept)}; expected at least one")
    images = _decode([encoded[index] for index in chosen_rows], chosen_rows, where)
    return images, torch.tensor([found[index] for index in chosen_rows])


def _from_hub(split: str, column: str) -> tuple[Sequence[Any], Sequence[Any], str]:
    from datasets import Image, load_dataset

    name = "uoft-cs/cifar10" if column == "label" else "uoft-cs/cifar100"
    loaded = load_named("data", "hub", lambda: load_dataset(name, split=split)).cast_column("img", Image(decode=False))
    return list(loaded["img"]), list(loaded[column]), f"the Hub's {name}"


def _from_folder(folder: str, split: str, column: str) -> tuple[Sequence[Any], Sequence[Any], str]:
    import pyarrow
    from pyarrow import parquet

    path = parquet_file(folder, split, ("img", column))
    try:
        table = parquet.read_table(path, columns=["img", column])
        return table["img"].to_pylist(), table[column].to_pylist(), str(path)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}); restore it from its source") from error


def parquet_file(folder: str, split: str, columns: Sequence[str]) -> Path:
    """Returns the file of a split after a look at its columns.

    Raises:
        `FileNotFoundError`, `ValueError`: it is not there, no parquet file, or lacks a column.
    """
    import pyarrow
    from pyarrow import parquet

    path = Path(folder) / f"{split}.parquet"
    if not path.is_file():
        raise FileNotFoundError(
            f"--data {folder}: looked for {path} and found no such file; give embedded, hub, or a folder with "
            + " and ".join(f"{name}.parquet" for name in SPLITS)
        )
    try:
        names = parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is not a parquet file ({first_line(error)}); restore it from its source") from error
    for name in columns:
        if names.count(name) != 1:
            lacks = f"lacks {name!r}" if name not in names else f"has {name!r} {names.count(name)} times"
            raise ValueError(
                f"{path} has the columns {names}, and {lacks}; expected {' and '.join(map(repr, columns))}"
            )
    return path


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _decode(encoded: Sequence[Any], rows: Sequence[int], where: str) -> torch.Tensor:
    """Maps N encoded images (bytes, or `{"bytes": ...}` as datasets has) to `(N, 3, 32, 32)`, uint8."""
    import numpy as np
    from PIL import Image

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
        except Exception as error:  # Pillow raises much else on damaged files
            raise ValueError(
                f"{where} has an image in row {row} that cannot be read ({first_line(error)}); restore it from its "
                "source"
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
    return images.float().sub_(255 * MEAN.to(images.device)).div_(255 * STD.to(images.device))


def crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Moves each of the images `(B, 3, 32, 32)` by up to 4 pixels, with black around it, and mirrors half of them."""
    count = len(images)
    top, left = torch.randint(0, 9, (2, count, 1), generator=generator).squeeze(-1)  # (B,) each
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    padded = F.pad(images, (MARGIN, MARGIN, MARGIN, MARGIN))
    return cut_and_flip(padded, torch.arange(count), top, left, mirrored.squeeze(-1))


def cut_and_flip(
    padded: torch.Tensor, chosen: torch.Tensor, top: torch.Tensor, left: torch.Tensor, mirrored: torch.Tensor
) -> torch.Tensor:
    """Cuts a window of 32 x 32 out of each chosen image, and mirrors some: `(B, 3, 32, 32)`; no loop over images.

    Args:
        padded (`torch.Tensor` of shape `(N, 3, 40, 40)`): Images with black around them.
        chosen, top, left (`torch.Tensor` of shape `(B,)`, int64): Which images, and where the window begins, 0 to 8.
        mirrored (`torch.Tensor` of shape `(B,)`, bool): Which windows are mirrored.
    """
    chosen, top, left = (index.to(padded.device) for index in (chosen, top, left))
    windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # (N, 3, 9, 9, 32, 32), a view
    cut = windows[chosen, :, top, left]
    return torch.where(mirrored.to(padded.device).view(-1, 1, 1, 1), cut.flip(3), cut)


class ImageSet(torch.utils.data.Dataset[Any]):
    """Images for a Trainer, whole batches at a time: `{"pixel_values": (B, 3, 32, 32), "labels": (B,)}`.

    Where an image is cut and whether it is mirrored follows from the seed, the epoch and its number alone, so that a
    resumed run, and many processes, see what one run sees.

    Args:
        images (`torch.Tensor` of shape `(N, 3, 32, 32)`, uint8), labels (`torch.Tensor` of shape `(N,)`): The data.
        augment (`bool`): Random crops and flips.
        seed (`int`, *optional*, defaults to 0): Of those.
        prepare (`Callable`, *optional*): Maps uint8 images to the model's input; by default [`normalize`].

    Example:

    ```python
    >>> from hf_sl2o.experiments.data.cifar import ImageSet, load_cifar
    >>> train = ImageSet(*load_cifar("embedded", "train", rows=100), augment=True)
    >>> train.__getitems__([3, 5])["pixel_values"].shape  # a DataLoader with collate_fn=as_is asks for this
    torch.Size([2, 3, 32, 32])
    ```
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        augment: bool,
        seed: int = 0,
        prepare: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        if not len(images):
            raise ValueError("the split is empty; give at least one image")
        self.images = F.pad(images, (MARGIN, MARGIN, MARGIN, MARGIN)) if augment else images
        self.labels, self.augment, self.seed, self.epoch = labels, augment, seed, 0
        self.prepare = normalize if prepare is None else prepare

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        chosen = torch.as_tensor(indices)
        if not self.augment:
            return {"pixel_values": self.prepare(self.images[chosen]), "labels": self.labels[chosen]}
        bits = mixed(chosen + 1_000_003 * (self.epoch + 1_009 * self.seed))
        cut = cut_and_flip(self.images, chosen, bits % 9, bits // 9 % 9, bits // 81 % 2 == 1)
        return {"pixel_values": self.prepare(cut), "labels": self.labels[chosen]}


def as_is(batch: Any) -> Any:
    """The collator of an [`ImageSet`], whose batches are made already."""
    return batch


def mixed(numbers: torch.Tensor) -> torch.Tensor:
    """Maps int64 numbers to pseudo-random ones below 2^31 (the finaliser of SplitMix64)."""
    z = numbers * -7046029254386353131
    z = (z ^ (z >> 30)) * -4658895280553007687
    z = (z ^ (z >> 27)) * -7723592293110705685
    return (z ^ (z >> 31)) & 0x7FFF_FFFF


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
