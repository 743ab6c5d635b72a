"""Checkpoints of meta-training: a folder each, and a manifest that names the newest one that is complete."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .files import load_json, load_tensors, save_json, save_tensors

MANIFEST = "checkpoint.json"


class Checkpoint(NamedTuple):
    """The newest complete checkpoint."""

    folder: Path
    progress: dict[str, Any]

    def tensors(self, part: str) -> dict[str, torch.Tensor]:
        return load_tensors(self.path(part))

    def path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"


class Checkpoints:
    """Those of one run, in its output folder. After a kill at any moment the previous one is there.

    Args:
        folder (`Path`): The run's.
        stamp (`dict`): What a run must share with the one that it goes on from: JSON values.
    """

    def __init__(self, folder: Path, stamp: dict[str, Any]) -> None:
        self.folder, self.stamp = folder, stamp

    def write(self, step: int, part: str, tensors: Mapping[str, torch.Tensor], **metadata: str) -> None:
        """Writes one part of the checkpoint at `step`; each process writes its own."""
        save_tensors(self.folder / self._name(step) / f"{part}.safetensors", tensors, **metadata)

    def complete(self, step: int, progress: dict[str, Any]) -> None:
        """Makes the checkpoint at `step` the newest, when all parts are there, and deletes the one before it."""
        manifest, name = self.folder / MANIFEST, self._name(step)
        previous = self._named_in(load_json(manifest)) if manifest.is_file() else None
        save_json(manifest, {"folder": name, "stamp": self.stamp, "progress": progress})
        if previous not in (None, name):
            shutil.rmtree(self.folder / previous, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """Returns the newest checkpoint, or None if the folder has none.

        Raises:
            `ValueError`: it belongs to a run of another stamp (the first difference is named), or names no checkpoint.
        """
        path = self.folder / MANIFEST
        if not path.is_file():
            return None
        manifest = load_json(path)
        for part, expected in self.stamp.items():
            found = manifest["stamp"].get(part)
            if found != expected:
                raise ValueError(
                    f"{path} was made with other settings: {_first_difference(part, found, expected)}; use another "
                    "output_dir, or delete it"
                )
        return Checkpoint(self.folder / self._named_in(manifest), manifest["progress"])

    def _named_in(self, manifest: dict[str, Any]) -> str:
        """The checkpoint's name; a path in its place could lead to any folder, and that be deleted."""
        name = str(manifest["folder"])
        if not re.fullmatch(r"checkpoint-\d{7,}", name):
            raise ValueError(
                f'{self.folder / MANIFEST} has "folder": {name!r}, expected checkpoint-NUMBER; restore it from its '
                "source"
            )
        return name

    @staticmethod
    def _name(step: int) -> str:
        return f"checkpoint-{step:07d}"


def under(tensors: Mapping[str, torch.Tensor], head: str) -> dict[str, torch.Tensor]:
    """Returns the tensors whose names begin with `head`, without it."""
    return {name.removeprefix(head): tensor for name, tensor in tensors.items() if name.startswith(head)}


def _first_difference(part: str, found: Any, expected: Any) -> str:
    """Names the first setting in which two stamps differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        key = next(key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key))
        return f"{key} was {found.get(key)!r}, this run has {expected.get(key)!r}"
    return f"{part} was {found!r}, this run has {expected!r}"
