"""Where a result was made: versions, device, commit, memory; and no folder of the machine."""

from __future__ import annotations

import importlib
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "hf_sl2o")


def _package_commit() -> str | None:
    """Of the checkout that hf_sl2o is imported from; None where it is installed."""
    package = Path(__file__).resolve().parents[1]
    command = ["git", "log", "-1", "--format=%H"]
    try:
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", "__init__.py"], cwd=package, capture_output=True, check=True
        )
        return subprocess.run(command, cwd=package, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(folder: str | Path | None = None) -> dict[str, Any]:
    """Returns versions, device, threads, and commit (with `dirty`) of a checkout: JSON values.

    Args:
        folder (`str` or `Path`, *optional*): In the checkout; by default that of the script that runs, or the working
            folder where none does.
    """
    if folder is None:
        script = getattr(sys.modules["__main__"], "__file__", None)
        folder = "." if script is None else Path(script).resolve().parent

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "python": platform.python_version(),
        "versions": versions,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "commit": git("rev-parse", "HEAD"),
        "package_commit": _package_commit(),
        "dirty": None if status is None else bool(status),
    }


def import_package(module: str, package: str, what: str) -> ModuleType:
    """Returns a module of an optional package; raises `ImportError` that says what to install for `what`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{what}: there is no package {package}; pip install {package}, or pip install "hf-sl2o[judge]" for all'
        ) from error


def reset_peak() -> None:
    """Starts measuring the peak anew (Linux resets a process' high-water mark by writing 5 here)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass


def peak_bytes() -> int | None:
    """Peak of device memory, or of the process' resident memory on a CPU; None where it cannot be had."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)


def portable(value: Any) -> Any:
    """Absolute paths, also in NAME=PATH, become their last part: results name no folder of the machine."""
    if isinstance(value, dict):
        return {key: portable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [portable(entry) for entry in value]
    if not isinstance(value, str):
        return value
    head, equals, path = value.rpartition("=")
    return f"{head}{equals}{Path(path).name}" if Path(path).is_absolute() else value
