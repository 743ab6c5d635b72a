"""Safetensors and JSON on disk: atomic writes, checked reads, nothing executed.

Whatever a run goes on from carries a checksum of all of it. In a safetensors file it is the metadata's "checksum": the
sha256 of the file with 64 zeros in its place. In JSON it is the key "checksum": the sha256 of the other keys. Files of
earlier versions have none and still load.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .partials import IN_USE, remove_partials, temporary_name

CHECKSUM = "checksum"
_SEAL = re.compile(rb'"checksum":"([0-9a-f]{64})"')
_UNSEALED = "0" * 64
# What the metadata of files without a checksum may hold: earlier versions wrote no other keys.
_OLD_METADATA = {"format", "step", "basis", "episode"}
# Bytes of a safetensors header, as the format allows, and of a JSON file; more is not read.
_LONGEST_HEADER, _LONGEST_JSON = 100_000_000, 1 << 28
_DEEPEST_JSON = 64
CHUNK = 1 << 22


# Writing


def write_atomically(writers: Mapping[Path, Callable[[str], object]]) -> None:
    """Calls each `writers[path](temporary)` beside its path (folders are made) and renames when all are done.

    After a full disk or a kill the previous files are there. What killed processes left in the folders is removed.

    Raises:
        `OSError`: a write failed; says which file and that the previous one is unchanged.
    """
    temporaries = {path: path.with_name(temporary_name(path.name)) for path in writers}
    IN_USE.update(temporaries.values())
    try:
        for path, write in writers.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporaries[path].touch()
                mode = temporaries[path].stat().st_mode
                write(str(temporaries[path]))
                os.chmod(temporaries[path], mode)  # as the umask says; safetensors makes files for their owner alone
                with open(temporaries[path], "r+b") as file:  # Windows flushes only what may be written
                    os.fsync(file.fileno())
            except (OSError, SafetensorError) as error:
                state = "the previous file is unchanged" if path.exists() else "nothing was left behind"
                refused = isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS
                remedy = "choose a folder that may be written to" if refused else "free some space and start again"
                raise OSError(f"could not write {path} ({error}); {state}; {remedy}") from error
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise
    finally:
        IN_USE.difference_update(temporaries.values())
    for folder in {path.parent for path in writers}:
        remove_partials(folder)


def json_writer(data: Any) -> Callable[[str], object]:
    text = json.dumps(data, indent=2) + "\n"
    return lambda path: Path(path).write_text(text, encoding="utf-8")


def tensor_writer(tensors: Mapping[str, torch.Tensor], **metadata: str) -> Callable[[str], object]:
    """Returns what writes a safetensors file with its checksum; `metadata` is kept beside the tensors."""
    contiguous: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = plain.untyped_storage().data_ptr()
        contiguous[name] = plain.clone() if storage in storages else plain  # one storage twice is not saved
        storages.add(storage)

    def write(path: str) -> None:
        save_file(contiguous, path, metadata={"format": "pt", **metadata, CHECKSUM: _UNSEALED})
        _sort_metadata(path)
        header, start, stop = read_header(Path(path))
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(_digest(Path(path), header).encode())

    return write


def save_json(path: str | Path, data: Any) -> None:
    write_atomically({Path(path): json_writer(data)})


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> None:
    """Writes a safetensors file with its checksum."""
    write_atomically({Path(path): tensor_writer(tensors, **metadata)})


# JSON


def load_json(path: str | Path, kind: type | None = None) -> Any:
    """Reads a JSON file.

    Args:
        path (`str` or `Path`): The file.
        kind (`type`, *optional*): What the whole must be: `dict` or `list`.

    Raises:
        `ValueError`: it is no JSON, too large, too deep, has a key twice, or is of another kind.
        `FileNotFoundError`: there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    remedy = "restore it from where it came from"
    if (size := path.stat().st_size) > _LONGEST_JSON:
        raise ValueError(f"{path} has {size} bytes, expected a JSON file of at most {_LONGEST_JSON}; {remedy}")
    try:
        data = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {remedy}") from error
    if kind is not None and not isinstance(data, kind):
        expected = "an object" if kind is dict else "a list"
        raise ValueError(f"{path} holds a JSON {type(data).__name__}, expected {expected}; {remedy}")
    return data


def parse_json(text: bytes | str) -> Any:
    """Returns what `text` (UTF-8) says; raises `ValueError` on a key that is there twice, as on any other fault."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {twice!r} is there twice")
        return made

    try:
        data = json.loads(text.decode() if isinstance(text, bytes) else text, object_pairs_hook=unique)
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"it is too deep or too large: {type(error).__name__}") from error
    for _ in _leaves(data):  # raises where it is too deep for what reads it
        pass
    return data


def check_finite(path: str | Path, data: Any) -> None:
    """Raises `ValueError` if NaN or Infinity is anywhere in JSON `data`, read from `path`."""
    for place, value in _leaves(data):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path} has {value} at {place!r}, expected a finite number; restore it from its source")


def _leaves(data: Any) -> Iterator[tuple[str, Any]]:
    """Yields each value of JSON data that is no list or object, with the keys that lead to it."""
    left: list[tuple[tuple[Any, ...], Any]] = [((), data)]
    while left:
        place, value = left.pop()
        if len(place) > _DEEPEST_JSON:
            raise ValueError(f"it is more than {_DEEPEST_JSON} levels deep")
        if isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            left += [((*place, key), entry) for key, entry in pairs]
        else:
            yield ".".join(map(str, place)), value


def json_checksum(data: Mapping[str, Any]) -> str:
    """Returns the sha256 of an object's keys and values, whatever their order; its own "checksum" does not count."""
    rest = {key: value for key, value in data.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `data` with its checksum."""
    return {**data, CHECKSUM: json_checksum(data)}


def check_seal(path: str | Path, data: Mapping[str, Any], remedy: str = "restore it from its source") -> None:
    """Raises `ValueError` if `data`, read from `path`, is not what was saved; without a checksum it is not checked."""
    if CHECKSUM in data and data[CHECKSUM] != (found := json_checksum(data)):
        raise ValueError(
            f"{path} says its checksum is {str(data[CHECKSUM])[:16]}..., its content has {found[:16]}...: it was "
            f"damaged or changed after it was saved; {remedy}"
        )


# Tensors


def open_tensors(path: str | Path, device: str = "cpu", *, sha256: str | None = None) -> Any:
    """Opens a safetensors file (a context manager, as `safe_open`) after a check of all its bytes.

    The bytes are read once, 4 MB at a time.

    Args:
        path (`str` or `Path`): The file.
        device (`str`, *optional*, defaults to `"cpu"`): Where its tensors go.
        sha256 (`str`, *optional*): Of the whole file, where that is known: checked instead of its own checksum.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: it is truncated, no safetensors file, or its content is not what was saved.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if sha256 is not None:
        check_sha256(path, sha256)
    with naming(path):
        header, start, stop = read_header(path)
        if sha256 is None and start and (found := _digest(path, header)) != (known := header[start:stop].decode()):
            raise ValueError(changed_content(known, found))
        return safe_open(str(path), framework="pt", device=device)


def changed_content(known: str, found: str) -> str:
    return f"its checksum is {known[:16]}..., its content has {found[:16]}...: it was changed"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns what reading a safetensors file raises into one sentence with its name."""
    try:
        yield
    except (SafetensorError, ValueError, MemoryError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated, damaged or not a safetensors file ({error}); copy or "
            "download it again"
        ) from error


def load_tensors(path: str | Path, *, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """Returns all tensors of a safetensors file by name; raises as [`open_tensors`] does."""
    with open_tensors(path, sha256=sha256) as file:
        return {name: read_tensor(path, file, name) for name in file.keys()}


def read_tensor(path: str | Path, file: Any, name: str) -> torch.Tensor:
    """Returns one tensor of an open file; raises `ValueError` if torch knows no such tensor."""
    try:
        return file.get_tensor(name)  # type: ignore[no-any-return]
    except (SafetensorError, TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise ValueError(f"the tensor {name!r} of {path} cannot be read ({error}); restore the file") from error


def load_metadata(path: str | Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file that was opened before."""
    with naming(Path(path)):
        header, _, _ = read_header(Path(path))
    return dict(json.loads(header[8:]).get("__metadata__") or {})


def checksum_of(path: str | Path) -> str | None:
    """Returns the checksum that a safetensors file carries, not checked; None for one without."""
    with naming(Path(path)):
        header, start, stop = read_header(Path(path))
    return header[start:stop].decode() if start else None


def read_header(path: Path) -> tuple[bytes, int, int]:
    """Returns the first bytes of a safetensors file, to the end of its header, and where the checksum is in them.

    Raises:
        `ValueError`: it is no header, has a key twice, or metadata that only a file with a checksum has.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"its header has {length} bytes")
        header = head + file.read(length)
    data = parse_json(header[8:])
    metadata = data.get("__metadata__", {}) if isinstance(data, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError("its header is no JSON object")
    if CHECKSUM in metadata:
        if (match := _SEAL.search(header)) is None:
            raise ValueError(f"its checksum is {str(metadata[CHECKSUM])[:16]!r}, expected 64 hexadecimal digits")
        return header, match.start(1), match.end(1)
    if unknown := sorted(set(metadata) - _OLD_METADATA):
        raise ValueError(f"its metadata has the key {unknown[0]!r} and no checksum")
    return header, 0, 0


def _sort_metadata(path: str) -> None:
    """Puts the metadata of a new file in order: else equal contents make files that differ, and a Hub keeps each."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        data = json.loads(file.read(length))
        data["__metadata__"] = dict(sorted(data["__metadata__"].items()))
        header = json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()
        if len(header) <= length:
            file.seek(8)
            file.write(header.ljust(length))


def unsealed(header: bytes) -> bytes:
    return _SEAL.sub(f'"checksum":"{_UNSEALED}"'.encode(), header)


def _digest(path: Path, header: bytes) -> str:
    """The sha256 of the file with zeros for its checksum."""
    digest = hashlib.sha256(unsealed(header))
    with open(path, "rb") as file:
        file.seek(len(header))
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_sha256(path: str | Path, expected: str) -> None:
    """Raises `ValueError` if the file's content is not what was saved."""
    if (found := sha256_of(path)) != expected:
        raise ValueError(
            f"{path} has sha256 {found[:16]}..., its config.json says {expected[:16]}...: the file was damaged or "
            "changed after it was saved; copy or download it again"
        )
