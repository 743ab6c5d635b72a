"""What the commands say: sizes, times, tables and lines of a terminal, and names that were mistyped."""

from __future__ import annotations

import argparse
import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from hf_sl2o_command import known

__all__ = ["WIDTH", "byte_count", "digits", "finite", "human_bytes", "human_time", "known", "rows_of", "wrapped"]

WIDTH = 100


def human_bytes(count: float) -> str:
    """Bytes in three digits; 1 GB is 1e9."""
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= 0.9995 * scale:
            return f"{digits(count / scale)} {unit}"
    return f"{count:.0f} B" if count else "-"


def byte_count(text: str) -> int:
    """Returns the bytes that a user wrote, such as `800000`, `800MB` or `2.5 GB`; 1 GB is 1e9."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGTP]?)B?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes, or a number with kB, MB, GB or TB")
    count = float(match[1]) * {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}[match[2]]
    return int(min(count, 1e30))  # hundreds of digits are inf


def human_time(seconds: float) -> str:
    for unit, scale in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * scale:
            return f"{digits(seconds / scale)} {unit}"
    return f"{digits(seconds * 1e6)} us"


def digits(value: float) -> str:
    return f"{value:.{max(0, 2 - (len(f'{value:.0f}') - 1 if value >= 1 else 0))}f}"


def wrapped(text: str, bullet: str = "") -> str:
    # a number stays with its unit
    glued = re.sub(r"(\d) ([A-Za-z]{1,3}\b|%)", "\\1\u00a0\\2", text)
    filled = textwrap.fill(glued, WIDTH, initial_indent=bullet, subsequent_indent=" " * len(bullet))
    return filled.replace("\u00a0", " ")


def rows_of(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns, the second one wrapped to the width of a terminal."""
    width = max(len(name) for name, _ in rows) + 2
    lines = []
    for name, text in rows:
        filled = textwrap.wrap(text, WIDTH - width, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [f"{name:<{width}}{filled[0]}".rstrip(), *(" " * width + line for line in filled[1:])]
    return "\n".join(lines)


def finite(value: Any) -> Any:
    """Returns JSON values with None for NaN and Infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
