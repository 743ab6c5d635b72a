"""Temporary files beside what they become: named by their process, and removed when that was killed."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
from pathlib import Path

_PARTIAL = re.compile(r"\..+\.(?:([0-9a-f]{8})-)?(\d+)\.partial")
# Seconds after which nobody still writes one file.
_LONGEST_WRITE = 86_400
# What this process is writing: a killed one may have had its number.
IN_USE: set[Path] = set()


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def temporary_name(name: str) -> str:
    """Returns the name of this process' temporary file for `name`."""
    return f".{name}.{_host()}-{os.getpid()}.partial"


def remove_partials(folder: Path) -> None:
    """Removes from `folder` the temporary files of killed processes, never those of one that lives."""
    try:
        names = [entry for entry in os.listdir(folder) if entry.endswith(".partial")]
    except OSError:
        return
    for name in names:
        match = _PARTIAL.fullmatch(name)
        if match is not None and _is_abandoned(folder / name, match[1], int(match[2])):
            (folder / name).unlink(missing_ok=True)


def _is_abandoned(path: Path, host: str | None, pid: int) -> bool:
    if os.name == "posix" and host in (None, _host()):
        if pid == os.getpid():
            return path not in IN_USE
        try:
            os.kill(pid, 0)  # asks only whether it is there
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:
            pass
    try:
        return time.time() - path.stat().st_mtime > _LONGEST_WRITE
    except OSError:
        return False
