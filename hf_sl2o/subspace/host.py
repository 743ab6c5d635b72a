"""Directions that stay in host memory, or in their file, while the parameters are on a device.

They go there in pieces of some columns: the next one is copied while the present one is multiplied. Each piece is a
tensor of its own, so that whoever keeps one keeps its numbers.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

#: Bytes of directions that are copied at a time. Three pieces are there at once: one in use, one that comes, and the
#: last one as long as somebody holds it.
PIECE_BYTES = 1 << 24
#: Bytes of them that are converted to the dtype of the arithmetic at a time.
CONVERTED_BYTES = 1 << 23
# A piece begins at a multiple of it: at a scale of int8 and int4, and at a whole byte.
_STEP = 256
# Where a tensor may begin in a buffer: at a multiple of any number's bytes.
_ALIGNED = 64

Cut = Callable[[int, int], Sequence[torch.Tensor]]


def apart(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether directions are elsewhere than what they are multiplied with."""
    return tensor.device != device


def widths(rows: int, stored_bytes: float, converted_bytes: int) -> tuple[int, int]:
    """Returns the columns of a piece and those converted at a time, multiples of 256, for the bytes of a number.

    Example:

    ```python
    >>> from hf_sl2o.subspace.host import widths
    >>> widths(rows=40, stored_bytes=2, converted_bytes=4)  # bf16
    (209664, 52224)
    ```
    """
    pairs = (PIECE_BYTES, stored_bytes), (CONVERTED_BYTES, converted_bytes)
    piece, converted = (max(_STEP, int(most / (rows * each)) // _STEP * _STEP) for most, each in pairs)
    return piece, converted


def in_host_memory(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns tensors on the CPU, where there is CUDA in pinned memory, from which it copies by itself."""
    there = [tensor.to("cpu") for tensor in tensors]
    return [tensor.pin_memory() for tensor in there] if torch.cuda.is_available() else there


def on_host(basis: Any) -> Any:
    """See [`Basis.on_host`]."""
    _check(basis)
    return basis if basis.stays_on_host else stays(basis._in_host_memory())


def stays(basis: Any) -> Any:
    """Marks a basis that was just made, with its directions on the host, and returns it."""
    _check(basis)
    basis.stays_on_host = True
    return basis


def _check(basis: Any) -> None:
    if not basis.may_stay_on_host:
        raise ValueError(
            f"a {basis.kind} basis stores {basis.nbytes:,} bytes and needs all of them on the device; move it with "
            "to(device), and load it without mapped=True"
        )


def pieces(
    numel: int, width: int, cut: Cut, device: torch.device
) -> Iterator[tuple[int, int, Sequence[torch.Tensor]]]:
    """Yields `(start, stop, cut(start, stop) on the device)`, the next piece on its way while one is used.

    Args:
        numel (`int`): Columns of the parameter.
        width (`int`): Columns of a piece.
        cut (`Callable`): Returns views of what is stored of the columns from start to stop, on the host.
        device (`torch.device`): Where they go.
    """
    ranges = [(start, min(start + width, numel)) for start in range(0, numel, width)]
    here, ahead = None, begin_copy(cut(*ranges[0]), device) if ranges else None
    try:
        for number, (start, stop) in enumerate(ranges):
            here, ahead = ahead, None
            if number + 1 < len(ranges):
                ahead = begin_copy(cut(*ranges[number + 1]), device)
            assert here is not None
            yield start, stop, _there(*here, device)
            here = None
    finally:
        for begun in (here, ahead):  # who stops early gives the memory back after the copy into it
            if begun is not None:
                _there(*begun, device)


def begin_copy(parts: Sequence[torch.Tensor], device: torch.device) -> tuple[list[torch.Tensor], Any]:
    """Begins to copy tensors; returns them on the device, and the event after which they are complete (or None)."""
    if device.type != "cuda":
        return [part.to(device) for part in parts], None
    return _lane(device).begin(parts)


def _there(tensors: list[torch.Tensor], ready: Any, device: torch.device) -> list[torch.Tensor]:
    """The tensors, complete for whatever the current stream does next; the host does not wait."""
    if ready is not None:
        torch.cuda.current_stream(device).wait_event(ready)
    return tensors


@functools.cache
def _lane(device: torch.device) -> _Lane:
    return _Lane(device)


class _Lane:
    """Copies to a CUDA device, on a stream of their own; what is not pinned goes by way of two pinned buffers."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.buffers: list[torch.Tensor] = []
        self.read: list[Any] = []  # of each buffer: the event after which it may be filled again
        self.turn, self.lock = 0, threading.Lock()

    def begin(self, parts: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
        # The memory is of the current stream, which frees it: the copy waits for what had it before.
        there = [torch.empty(part.shape, dtype=part.dtype, device=self.device) for part in parts]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with self.lock, torch.cuda.stream(self.stream):
            if all(part.is_pinned() for part in parts):
                for part, out in zip(parts, there, strict=True):
                    _copy_rows(part, out)
            else:
                self._by_buffer(parts, there)
            ready = torch.cuda.Event()
            ready.record(self.stream)
        return there, ready

    def _by_buffer(self, parts: Sequence[torch.Tensor], there: Sequence[torch.Tensor]) -> None:
        places, size = [], 0
        for part in parts:
            places.append(size)
            size += -(-part.numel() * part.itemsize // _ALIGNED) * _ALIGNED
        buffer = self._free_buffer(size)
        for part, place, out in zip(parts, places, there, strict=True):
            staged = buffer[place : place + part.numel() * part.itemsize].view(part.dtype).view(part.shape)
            out.copy_(staged.copy_(part), non_blocking=True)
        self.read[self.turn].record(self.stream)

    def _free_buffer(self, size: int) -> torch.Tensor:
        if not self.buffers or self.buffers[0].numel() < size:
            self.stream.synchronize()
            size = max(size, PIECE_BYTES + (1 << 20))  # scales lie beside the codes
            self.buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self.read = [torch.cuda.Event() for _ in range(2)]
        self.turn = 1 - self.turn
        self.read[self.turn].synchronize()
        return self.buffers[self.turn]


def _copy_rows(part: torch.Tensor, out: torch.Tensor) -> None:
    """Copies pinned memory; torch would first gather rows that do not lie one behind the other."""
    if part.is_contiguous():
        out.copy_(part, non_blocking=True)
        return
    for row, out_row in zip(part, out, strict=True):
        out_row.copy_(row, non_blocking=True)
