"""Checkpoints of meta-training: a folder each, and a manifest that names the newest one that is complete."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..foundation.checked import check_float, check_shapes, shown
from ..foundation.files import check_seal, checksum_of, load_json, load_tensors, save_json, save_tensors, sealed
from ..foundation.partials import remove_partials

MANIFEST = "checkpoint.json"
_NAME = re.compile(r"checkpoint-\d{7,}(-again)?")
# Entries of optimizers' states of the shape of their parameter.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")
REMEDY = "restore the folder from where it came from, or delete it and start anew"


class Checkpoint(NamedTuple):
    """The newest complete checkpoint."""

    folder: Path
    progress: dict[str, Any]
    parts: dict[str, str] | None  # checksum of each part; None in one of an earlier version

    def tensors(self, part: str) -> dict[str, torch.Tensor]:
        """Returns a part's tensors; raises `ValueError` if it is gone, damaged, or of another checkpoint."""
        return load_tensors(self.path(part))

    def path(self, part: str) -> Path:
        """Returns a part's file; raises as `tensors` does, but for damage inside."""
        path = self.folder / f"{part}.safetensors"
        if not path.is_file():
            raise ValueError(f"{self.folder.parent / MANIFEST} names {path}, and that file is gone; {REMEDY}")
        if self.parts is not None and checksum_of(path) != self.parts.get(part):
            raise ValueError(f"{path} belongs to another checkpoint than {self.folder.parent / MANIFEST}; {REMEDY}")
        return path


class Checkpoints:
    """Those of one run, in its output folder. After a kill at any moment the previous one is there.

    Args:
        folder (`Path`): The run's.
        stamp (`dict`): What a run must share with the one that it goes on from: JSON values.
        added_later (`Mapping`, *optional*): By part of the stamp, settings that older checkpoints may lack, and what
            these runs did.
    """

    def __init__(
        self,
        folder: Path,
        stamp: dict[str, Any],
        added_later: Mapping[str, Mapping[str, Any]] | None = None,
        gone: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.folder, self.stamp, self.added_later, self.gone = folder, stamp, added_later or {}, gone or {}

    def write(self, step: int, part: str, tensors: Mapping[str, torch.Tensor], **metadata: str) -> None:
        """Writes one part of the checkpoint at `step`; each process writes its own."""
        save_tensors(self.folder / self._name(step) / f"{part}.safetensors", tensors, **metadata)

    def complete(self, step: int, progress: dict[str, Any]) -> None:
        """Makes the checkpoint at `step` the newest, when all parts are there, and deletes the one before it."""
        name, previous = self._name(step), self._newest_name()
        parts = {path.stem: checksum_of(path) for path in sorted((self.folder / name).glob("*.safetensors"))}
        content = {"folder": name, "stamp": self.stamp, "progress": progress, "parts": parts}
        save_json(self.folder / MANIFEST, sealed(content))
        if previous is not None:
            shutil.rmtree(self.folder / previous, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Deletes what killed starts left: checkpoints that the manifest does not name, and temporary files."""
        newest = self._newest_name()
        for path in self.folder.glob("checkpoint-*"):
            if path.is_dir() and _NAME.fullmatch(path.name) and path.name != newest:
                shutil.rmtree(path, ignore_errors=True)
        for folder in (self.folder, *([] if newest is None else [self.folder / newest])):
            remove_partials(folder)

    def newest(self) -> Checkpoint | None:
        """Returns the newest checkpoint, or None if the folder has none.

        Raises:
            `ValueError`: it belongs to a run of another stamp (the first difference is named), the manifest is
                damaged, or it names no checkpoint.
        """
        path = self.folder / MANIFEST
        if not path.is_file():
            return None
        manifest = load_json(path, dict)
        name, parts = self._named_in(manifest), manifest.get("parts")
        for key in ("stamp", "progress"):
            if not isinstance(manifest.get(key), dict):
                raise ValueError(f"{path} has {key!r}: {shown(manifest.get(key))}, expected an object; {REMEDY}")
        if not (parts is None or isinstance(parts, dict)) or (parts is None and "parts" in manifest):
            raise ValueError(f'{path} has "parts": {shown(parts)}, expected an object; {REMEDY}')
        check_seal(path, manifest, REMEDY)
        for part, expected in self.stamp.items():
            found = manifest["stamp"].get(part)
            if isinstance(found, dict):
                later = self.added_later.get(part, {})
                gone = self.gone.get(part, {})
                found = {key: value for key, value in found.items() if gone.get(key, ...) != value}
                found = {**{key: value for key, value in later.items() if key in expected}, **found}
            if found != expected:
                raise ValueError(
                    f"{path} was made with other settings: {_first_difference(part, found, expected)}; use another "
                    "output_dir, or delete it"
                )
        return Checkpoint(self.folder / name, manifest["progress"], parts)

    def _newest_name(self) -> str | None:
        path = self.folder / MANIFEST
        return self._named_in(load_json(path, dict)) if path.is_file() else None

    def _named_in(self, manifest: dict[str, Any]) -> str:
        """The checkpoint's name; a path in its place could lead to any folder, and that be deleted."""
        name = manifest.get("folder")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f'{self.folder / MANIFEST} has "folder": {shown(name)}, expected checkpoint-NUMBER; {REMEDY}'
            )
        return name

    def _name(self, step: int) -> str:
        """The name to write under: not that of the newest one, which stays whole until the next is complete."""
        name = f"checkpoint-{step:07d}"
        return f"{name}-again" if name == self._newest_name() else name


def under(tensors: Mapping[str, torch.Tensor], head: str) -> dict[str, torch.Tensor]:
    """Returns the tensors whose names begin with `head`, without it."""
    return {name.removeprefix(head): tensor for name, tensor in tensors.items() if name.startswith(head)}


def check_like(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str, *, finite: bool = False
) -> None:
    """Raises `ValueError` unless `found` has the names, shapes and dtypes of `expected`; names the first difference.

    Args:
        found, expected (`Mapping[str, torch.Tensor]`): Tensors by name.
        where (`str`): The file, for the message.
        finite (`bool`, *optional*, defaults to `False`): Refuse NaN and Inf, too.
    """
    check_shapes(found, expected, where, REMEDY)
    for name, tensor in found.items():
        if tensor.dtype != expected[name].dtype:
            raise ValueError(
                f"{name!r} in {where} has dtype {tensor.dtype}, expected {expected[name].dtype}; {REMEDY}"
            )
        if finite:
            check_float(tensor, f"{name!r} in {where}")


def check_progress(progress: Mapping[str, Any], where: str) -> None:
    """Raises `ValueError` unless `progress` is what a meta-trainer saves; names the first key that is not."""
    kinds = {"epoch": int, "meta_step": int, "window": int, "best": float, "log_history": list, "in_episode": bool}
    for name, kind in kinds.items():
        value = progress.get(name)
        entries = value if kind is list and isinstance(value, list) else []
        bad = kind is float and value != value or type(value) is int and not 0 <= value < 1 << 31
        if type(value) is not kind or bad or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{where} has {name!r}: {shown(value)}, expected {kind.__name__}; {REMEDY}")


def optimizer_state(
    tensors: Mapping[str, torch.Tensor], parameters: Sequence[torch.nn.Parameter], where: str
) -> dict[int, dict[str, torch.Tensor]]:
    """Returns the state of a meta-optimizer by parameter from tensors named `number.key`.

    Raises:
        `ValueError`: a name of another form, a number of no parameter, NaN, parameters of different keys, or a moment
            whose shape is not its parameter's.
    """
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        if not (number.isdecimal() and number.isascii() and key and int(number[:9]) < len(parameters)):
            raise ValueError(f"{where} has an unknown tensor 'optimizer.{name}'; {REMEDY}")
        wanted = {"step": ()} | dict.fromkeys(_MOMENTS, tuple(parameters[int(number)].shape))
        if tuple(value.shape) != wanted.get(key, tuple(value.shape)):
            raise ValueError(
                f"{where} has 'optimizer.{name}' with shape {tuple(value.shape)}, expected {wanted[key]}; {REMEDY}"
            )
        counts = (torch.float32, torch.get_default_dtype())
        if not value.is_floating_point() if key in _MOMENTS else key == "step" and value.dtype not in counts:
            raise ValueError(f"{where} has 'optimizer.{name}' with dtype {value.dtype}, expected floats; {REMEDY}")
        # a moment may be infinite: the square of a meta-gradient that was finite
        if bool(value.isnan().any()) or (key == "step" and not bool(value.isfinite() & (value >= 0))):
            raise ValueError(f"'optimizer.{name}' in {where} holds NaN, or is no count; {REMEDY}")
        state.setdefault(int(number), {})[key] = value
    for index, values in state.items():
        if values.keys() != state[min(state)].keys():
            different = sorted(values.keys() ^ state[min(state)].keys())[0]
            raise ValueError(f"{where} has {different!r} of some parameters, not of 'optimizer.{index}'; {REMEDY}")
    return state


def _first_difference(part: str, found: Any, expected: Any) -> str:
    """Names the first setting in which two stamps differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        key = next(key for key in sorted({*found, *expected}) if found.get(key, ...) != expected.get(key, ...))
        return f"{key} was {found.get(key)!r}, this run has {expected.get(key)!r}"
    return f"{part} was {found!r}, this run has {expected!r}"
