"""Writes one HTML page to look at, from a run or a comparison.

    hf-sl2o report outputs/own
    hf-sl2o report recipes/results/gpt2_e2e.json --page e2e.html --png figures

OUTPUT is the folder of a comparison, of a Trainer's run, of a meta-training or of a basis, or a JSON file of results.
The page loads nothing and holds no script: it opens without a network, and can be sent as it is. It is below 1 MB.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .folders import check_parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds OUTPUT, `--page` and `--png`."""
    parser.add_argument("output", metavar="OUTPUT", help="a folder of these, or a JSON file")
    parser.add_argument("--page", metavar="FILE", help="where the page goes (OUTPUT/report.html; NAME.html of a file)")
    parser.add_argument("--png", metavar="FOLDER", help="write each figure there, too; needs matplotlib")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Writes the page, and the figures where they are asked for.

    Raises:
        `ValueError`: OUTPUT is nothing that can be reported on.
        `RuntimeError`: matplotlib is missing; the page is written.
    """
    from ..experiments.report import report_on, write_figures, write_page

    output = Path(arguments.output)
    default = output / "report.html" if output.is_dir() else output.with_suffix(".html")
    path = Path(arguments.page) if arguments.page is not None else default
    if path.is_dir():
        raise ValueError(f"--page {path}: this is a folder; give a file in it, as {path / 'report.html'}")
    if path.exists() and path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--page {path}: this file is there and no page, and is not overwritten; give NAME.html")
    check_parent(f"--page {path}:", path, "file")
    if arguments.png is not None and Path(arguments.png).is_file():
        raise ValueError(f"--png {arguments.png}: this is a file; give a folder")
    try:
        report = report_on(output)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    count, figures = write_page(report, path), report.figures()
    facts = {
        "kind": report.kind, "page": str(path), "bytes": count, "sections": [part.title for part in report.sections],
        "figures": [figure.title for figure in figures], "png": list[str](),
    }  # fmt: skip
    text = f"{path}: {report.kind}, {len(figures)} figures, {count / 1e3:.0f} kB. Open it in a browser."
    if arguments.png is not None:
        try:
            facts["png"] = [str(made) for made in write_figures(report, arguments.png)]
        except ImportError as error:
            raise RuntimeError(f"{path} is written, and no PNG: {error}") from error
        text += f"\n{arguments.png}: {len(figures)} PNG files."
    return facts, text
