"""C++ loops of the package, compiled at their first use; where there is no compiler, torch does the work.

A loop is worth compiling where torch has none that is fast: products of bf16, int8 or int4 directions with fp32
vectors on a CPU, and a small LSTM over millions of coordinates. The sources lie beside the modules that call them.
What is compiled is kept in the user's cache folder, by a digest of the source, the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .files import write_atomically

logger = logging.getLogger(__name__)

#: "0" in this environment variable keeps to torch.
SWITCH = "HF_SL2O_NATIVE"
#: -march=native: the file is of this processor. Contraction to fused multiply-adds changes the last digit alone.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
         "-fPIC", "-shared", "-pthread")  # fmt: skip
_SECONDS = 180


@functools.cache
def load_native(source: Path) -> ctypes.CDLL | None:
    """Compiles a C++ source file of this package into a shared library, and loads it.

    Args:
        source (`Path`): A file whose functions are `extern "C"`.

    Returns:
        The library; None where it cannot be had: no compiler (`$CXX`, else `c++`), one that fails (said in a warning),
        Windows, or `HF_SL2O_NATIVE=0`. Later calls return the same.
    """
    compiler = _compiler()
    if compiler is None:
        return None
    try:
        path = _folder() / f"{source.stem}-{_digest(source.read_bytes(), compiler.version, _processor())}.so"
        if not path.is_file():
            _compile(compiler.words, source, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        logger.warning(
            "%s could not be compiled (%s): torch does its work, slower; %s=0 keeps to that",
            source.name,
            error,
            SWITCH,
        )
        return None


def loops_fact() -> str | None:
    """What says whether two processes have the same loops, whose sums differ from torch's in the last digit."""
    compiler = _compiler()
    return None if compiler is None else _digest(compiler.version)


class _Compiler(NamedTuple):
    words: list[str]
    version: bytes  # with the flags


def _compiler() -> _Compiler | None:
    if os.environ.get(SWITCH) == "0" or sys.platform == "win32":
        return None
    words = shlex.split(os.environ.get("CXX", "c++"))
    if not words or shutil.which(words[0]) is None:
        logger.info("there is no C++ compiler (%s): torch does the work of compiled loops, slower", words)
        return None
    return _Compiler(words, _version(tuple(words)) + repr((words, FLAGS)).encode())


@functools.cache
def _version(words: tuple[str, ...]) -> bytes:
    try:
        return subprocess.run([*words, "--version"], capture_output=True, timeout=_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return b""


def _compile(compiler: list[str], source: Path, path: Path) -> None:
    def write(part: str) -> None:
        words = [*compiler, *FLAGS, "-x", "c++", str(source), "-o", part]
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
            raise RuntimeError(f"{compiler[0]} failed: {said[0]}")

    write_atomically({path: write})  # processes that compile at the same time do not meet


@functools.cache
def _folder() -> Path:
    """The user's cache folder; where nothing can be written there, one of this process."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_sl2o" / "native"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except OSError:
        folder = tempfile.TemporaryDirectory(prefix="hf_sl2o_native_")
        _folders.append(folder)  # removed at the end of the process
        return Path(folder.name)


_folders: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def _processor() -> bytes:
    """What tells processors apart whose instructions differ; a cache folder may be shared between machines."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(errors="replace").splitlines() if known.is_file() else []
    wanted = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(wanted)]).encode()


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
