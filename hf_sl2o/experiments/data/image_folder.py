"""Images of a folder, or of a stream, as a vision transformer takes them."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from ..command_line.flags import load_named
from ..kept.keys import stamp
from .cifar import first_line


def pixels(image: Image.Image, size: int, chance: random.Random | None) -> torch.Tensor:
    """Maps an image to `(3, size, size)` in [-1, 1]: a random crop and flip, or the middle for evaluation."""
    image = image.convert("RGB")
    width, height = image.size
    if chance is None:
        side = 0.875 * min(width, height)
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    else:
        area, ratio = chance.uniform(0.25, 1.0) * width * height, chance.uniform(3 / 4, 4 / 3)
        w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
        left, top = chance.uniform(0, width - w), chance.uniform(0, height - h)
        box = (left, top, left + w, top + h)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
    values = values.flip(2) if chance is not None and chance.random() < 0.5 else values
    return values.float() / 127.5 - 1


class Pictures(torch.utils.data.Dataset[Any]):
    """Rows of a split as the model takes them; crops follow from the seed, `epoch` and the row.

    Args:
        rows (`Sequence`): Mappings with `image` and `label`; images as PIL has them, or as
            `{"bytes", "path"}` of a file, one of which may be None.
        size (`int`): Pixels on a side.
        seed (`int`, *optional*): Of random crops; None: the middle.
    """

    def __init__(self, rows: Any, size: int, seed: int | None) -> None:
        self.rows, self.size, self.seed, self.epoch = rows, size, seed, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        chance = None if self.seed is None else random.Random(f"{self.seed}-{self.epoch}-{index}")
        image = row["image"]
        try:
            if isinstance(image, dict):
                with Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])) as opened:
                    values = pixels(ImageOps.exif_transpose(opened), self.size, chance)
            else:
                values = pixels(image, self.size, chance)
        except Exception as error:  # Pillow raises much on damaged files
            where = (image.get("path") if isinstance(image, dict) else None) or f"the image of row {index}"
            raise ValueError(f"{where} cannot be read ({first_line(error)}); restore or remove the file") from error
        return {"pixel_values": values, "labels": row["label"]}


def listing(folder: str) -> str:
    """Identifies an image folder: a hash of the names and sizes of its files."""
    files = (
        (str(path.relative_to(folder)), path.stat().st_size) for path in Path(folder).rglob("*") if path.is_file()
    )
    return stamp(sorted(files))


def image_folder(folder: str) -> dict[str, Any]:
    """Returns the splits of an image folder.

    Raises:
        `FileNotFoundError`, `ValueError`: no such folder, a split without classes or images, or with other classes.
    """
    import datasets
    from datasets import load_dataset

    classes: list[str] | None = None
    for split in ("train", "validation"):
        where = Path(folder) / split
        if not where.is_dir():
            raise FileNotFoundError(
                f"--data {folder}: looked for the folder {where} and found none; give hub, or a folder with "
                "train/CLASS/* and validation/CLASS/*"
            )
        found = sorted(path.name for path in where.iterdir() if path.is_dir())
        if not found:
            raise ValueError(
                f"{where} has no folders, and so no classes; put the images of each class into a folder of its own"
            )
        if classes is not None and found != classes:
            other = min(set(found) ^ set(classes))
            raise ValueError(f"only one of train and {split} has the class {other!r}; give both the same ones")
        classes = found
        endings = Image.registered_extensions()
        for name in found:
            images = [path for path in (where / name).rglob("*") if path.suffix.lower() in endings]
            if not images:
                raise ValueError(f"{where} holds no images of the class {name!r}; expected some in each class")
            if empty := [path for path in images if not path.stat().st_size]:
                raise ValueError(f"{empty[0]} is empty; restore or remove the file")
    splits = load_named("data", folder, lambda: load_dataset("imagefolder", data_dir=folder))
    # Files are opened where they are needed: what is wrong with one is then said with its name.
    return {name: split.cast_column("image", datasets.Image(decode=False)) for name, split in splits.items()}


def stacked(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    images = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows])
    return {"pixel_values": images, "labels": torch.tensor([int(row["labels"]) for row in rows])}
