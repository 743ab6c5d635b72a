"""Rows of a CSV file of which none is swallowed: whatever is odd is said with the file, the row and what to do.

Python's reader takes a stray quote for the beginning of a long cell, and what follows for a part of it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Returns `columns` of every row of a comma-separated UTF-8 file with a header; further columns are left out.

    Rows count from 1 behind the header. Empty lines are no rows.

    Raises:
        `ValueError`: another encoding, NUL bytes, no rows; a column that is missing or there twice; a row with more
            or fewer cells than the header, an empty cell, or a cell that goes on over what looks like other rows.
    """
    reader = csv.reader(io.StringIO(decoded(path), newline=""), strict=True)
    numbered = rows_of(reader, path)
    header = next((cells for _, cells in numbered), [])
    if not header:
        raise ValueError(f"{path} is empty; expected a header with {_listed(columns)}, and rows")
    for name in columns:
        if name not in header:
            other = next((mark for mark in ";\t|" if mark in header[0]), None) if len(header) == 1 else None
            advice = "" if other is None else f"; its cells seem to be divided by {other!r}: save it with commas"
            raise ValueError(
                f"{path} has the columns {header}, and lacks {name!r}; expected {_listed(columns)}{advice}"
            )
        if header.count(name) > 1:
            raise ValueError(f"{path} has the column {name!r} {header.count(name)} times; leave one of them")
    rows = []
    for row, (line, cells) in enumerate(numbered, 1):
        where = f"{path}, row {row} (line {line})"
        if len(cells) != len(header):
            raise ValueError(
                f"{where} has {len(cells)} cells and the header {len(header)}; put cells that hold a comma between "
                "quotes, and remove stray quotes"
            )
        for name, cell in zip(header, cells, strict=True):
            if swallows(cell, len(header)):
                raise ValueError(
                    f"{where}: {name!r} goes on over {cell.count(chr(10))} line breaks, behind which there are other "
                    f"rows: {cell[:40]!r}...; remove the stray quote before it"
                )
        found = {name: cells[header.index(name)] for name in columns}
        if empty := [name for name, cell in found.items() if not cell.strip()]:
            raise ValueError(f"{where} has nothing in {empty[0]!r}; fill the cell, or remove the row")
        rows.append(found)
    if not rows:
        raise ValueError(f"{path} has no rows; expected at least one with {_listed(columns)}")
    return rows


def decoded(path: Path) -> str:
    """Returns the text of a UTF-8 file, with or without a byte order mark."""
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16, expected UTF-8; save it so (iconv -f UTF-16 -t UTF-8)")
    if (nul := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, nul) + 1
        raise ValueError(
            f"{path}, row {line - 1} (line {line}) holds a NUL byte: it is damaged, or UTF-16 or UTF-32; restore it, "
            "or save it as UTF-8"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, row {line - 1} (line {line}) is not UTF-8: it holds the byte 0x{content[error.start]:02x}; save "
            "the file as UTF-8 (from Latin-1: iconv -f ISO-8859-1 -t UTF-8)"
        ) from error


def rows_of(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the line on which each row begins, and its cells; says where a quote is not closed."""
    row = 0
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path}, row {row} (line {line}) cannot be read ({error}): a quote that is not closed, or a quote "
                "within a cell; remove it, or write two for one"
            ) from error
        if cells:
            row += 1
            yield line, cells


def swallows(cell: str, columns: int) -> bool:
    """Whether a line within a cell looks like a row of its own."""
    return "\n" in cell and any(len(cells) == columns for line in cell.split("\n")[1:] for cells in csv.reader([line]))


def _listed(columns: Sequence[str]) -> str:
    return " and ".join(map(repr, columns))
