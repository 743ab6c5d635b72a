"""Safetensors and JSON on disk: atomic writes, checked reads, nothing executed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def write_atomically(writers: Mapping[Path, Callable[[str], object]]) -> None:
    """Calls each `writers[path](temporary)` beside its path (folders are made) and renames when all are done.

    After a full disk or a kill the previous files are there.

    Raises:
        `OSError`: a write failed; says which file and that the previous one is unchanged.
    """
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in writers}
    try:
        for path, write in writers.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write(str(temporaries[path]))
                with open(temporaries[path], "r+b") as file:  # Windows flushes only what may be written
                    os.fsync(file.fileno())
            except (OSError, SafetensorError) as error:
                state = "the previous file is unchanged" if path.exists() else "nothing was left behind"
                raise OSError(f"could not write {path} ({error}); {state}; free some space and start again") from error
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def json_writer(data: Any) -> Callable[[str], object]:
    text = json.dumps(data, indent=2) + "\n"
    return lambda path: Path(path).write_text(text, encoding="utf-8")


def tensor_writer(tensors: Mapping[str, torch.Tensor], **metadata: str) -> Callable[[str], object]:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return lambda path: save_file(contiguous, path, metadata={"format": "pt", **metadata})


def save_json(path: str | Path, data: Any) -> None:
    write_atomically({Path(path): json_writer(data)})


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> None:
    write_atomically({Path(path): tensor_writer(tensors, **metadata)})


def load_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it from where it came from") from error


def open_tensors(path: str | Path, device: str = "cpu") -> Any:
    """Opens a safetensors file (a context manager, as `safe_open`) with an error that says what is wrong."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return safe_open(str(path), framework="pt", device=device)
    except SafetensorError as error:
        size = Path(path).stat().st_size
        raise ValueError(
            f"{path} ({size} bytes) is truncated or not a safetensors file ({error}); copy or download it again"
        ) from error


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def check_sha256(path: str | Path, expected: str | None) -> None:
    """Raises `ValueError` if the file's content is not what was saved."""
    if expected is not None and (found := sha256_of(path)) != expected:
        raise ValueError(
            f"{path} has sha256 {found[:16]}..., its config.json says {expected[:16]}...: the file was damaged or "
            "changed after it was saved; copy or download it again"
        )
