"""Safetensors files that are read in pieces, or are views of the file: a piece is in memory, never the file."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .files import CHUNK, changed_content, naming, open_tensors, read_header, read_tensor, unsealed

#: Dtypes by their names in the format.
FLOATS_BY_NAME = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_MAPPED = {**FLOATS_BY_NAME, "I8": torch.int8, "U8": torch.uint8}


class TensorFile:
    """A safetensors file that is read in pieces, without mapping it into memory; a context manager.

    Args:
        path (`str` or `Path`): The file.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: it is truncated, or no safetensors file. Its checksum is looked at in `check`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")
        with naming(self.path):
            header, start, stop = read_header(self.path)
            with safe_open(str(self.path), framework="pt"):
                pass  # names, sizes and offsets fit
        self._entries: dict[str, Any] = json.loads(header[8:])
        self.metadata: dict[str, str] = self._entries.pop("__metadata__", None) or {}
        self._data, self._known = len(header), header[start:stop].decode()
        self._sum, self._summed = hashlib.sha256(unsealed(header)), len(header)
        self._file = open(self.path, "rb", buffering=0)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> str:
        """As the format writes it, such as `"F32"`."""
        return str(self._entries[name]["dtype"])

    def place(self, name: str) -> int:
        """Where the tensor begins: files are read fastest in this order."""
        return int(self._entries[name]["data_offsets"][0])

    def bytes_of(self, name: str, first: int, last: int) -> int:
        """Bytes of rows `first` to `last` of a tensor of F16, BF16, F32 or F64."""
        return (last - first) * FLOATS_BY_NAME[self.dtype(name)].itemsize * math.prod(self.shape(name)[1:])

    def rows(
        self,
        name: str,
        first: int = 0,
        last: int | None = None,
        *,
        summing: bool = False,
        buffer: bytearray | None = None,
    ) -> torch.Tensor:
        """Reads rows `first` to `last` of a tensor of F16, BF16, F32 or F64; a scalar has one row.

        With `summing` the bytes count for `check`, which need not read them again; pieces come in their order then.
        With a `buffer` that is large enough the tensor is a view of it.
        """
        shape, dtype = self.shape(name), FLOATS_BY_NAME[self.dtype(name)]
        last = (shape[0] if shape else 1) if last is None else last
        size = self.bytes_of(name, first, last)
        whole = memoryview(bytearray(size) if buffer is None else buffer)[:size]
        start = self._data + self.place(name) + self.bytes_of(name, 0, first)
        if summing and start > self._summed:
            self._sum_to(start)
        self._file.seek(start)
        view = whole
        while view:
            count = self._file.readinto(view)
            if not count:
                raise ValueError(f"{self.path} became shorter while it was read; record or copy it again")
            view = view[count:]
        if summing and start == self._summed:
            self._sum.update(whole)
            self._summed += size
        if not size:
            return torch.empty(last - first, *shape[1:], dtype=dtype)
        return torch.frombuffer(whole, dtype=dtype).view((last - first, *shape[1:]) if shape else ())

    def mapped(self) -> dict[str, torch.Tensor]:
        """Returns the tensors of F16, BF16, F32, F64, I8 and U8 as views of the file; see [`map_tensors`]."""
        views, memory = {}, mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        for name in self._entries:
            if (dtype := _MAPPED.get(self.dtype(name))) is None:
                continue
            shape, place = self.shape(name), self._data + self.place(name)
            if count := math.prod(shape):
                view = torch.frombuffer(memory, dtype=dtype, count=count, offset=place)
                views[name] = (view if place % dtype.itemsize == 0 else view.clone()).view(shape)
            else:
                views[name] = torch.empty(shape, dtype=dtype)
        return views

    def check(self) -> None:
        """Raises `ValueError` where the content is not what was saved; reads what was not read for it yet."""
        self._sum_to(self.path.stat().st_size)
        if self._known and (found := self._sum.copy().hexdigest()) != self._known:
            with naming(self.path):
                raise ValueError(changed_content(self._known, found))

    def _sum_to(self, stop: int) -> None:
        self._file.seek(self._summed)
        while self._summed < stop and (chunk := self._file.read(min(CHUNK, stop - self._summed))):
            self._sum.update(chunk)
            self._summed += len(chunk)


def map_tensors(path: str | Path, *, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """Returns all tensors of a safetensors file by name, those of floats and bytes as views of it.

    What is read of a view comes into memory, and the system may drop it again. What is written to one stays in this
    process: the file is never changed. Nobody else may change it in place, or cut it, while views are used; another
    file in its place (as `save_pretrained` puts it) does not matter. Tensors that do not begin at a multiple of their
    numbers' bytes, which no file of ours has, are copied.

    Args:
        path (`str` or `Path`): The file.
        sha256 (`str`, *optional*): As of [`open_tensors`], which raises what this raises.
    """
    with open_tensors(path, sha256=sha256) as known, TensorFile(path) as file:
        views = file.mapped()
        return {name: views[name] if name in views else read_tensor(path, known, name) for name in known.keys()}
