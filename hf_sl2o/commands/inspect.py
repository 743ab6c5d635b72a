"""Says what is in a file or folder: a basis, rule, fine-tune, trajectory, checkpoint, comparison, or any safetensors.

    hf-sl2o inspect basis

WHAT is a path, the name of a rule that ships (default), or the id of a Hub repository. All bytes are read and compared
with their checksums; weights that have none are said to have none. Of a Trainer's checkpoint only the weights in one
file and the coefficients are read.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ..foundation.files import load_json
from ..meta.checkpoints import MANIFEST
from ..rules import SHIPPED_RULES
from .contents import (
    Row,
    about_basis,
    about_comparison,
    about_finetuned,
    about_meta_training,
    about_rule,
    about_tensors,
    about_trainer,
    about_trajectory,
)
from .kinds import fetched, is_hub_id, kind_in
from .words import rows_of

_COMPARISON, _TRAJECTORY, _STATE = "comparison.json", "trajectory.json", "trainer_state.json"
_EXPECTED = (
    "expected a rule, a basis, a fine-tune, a trajectory, a Trainer's checkpoint, a comparison, or a .safetensors file"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="WHAT", help="a file, a folder, a rule that ships, or a Hub id")
    parser.add_argument("--revision", metavar="NAME", help="of a Hub repository: a branch, a tag or a commit (main)")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Finds out what it is, and describes it."""
    what, path = arguments.what, Path(arguments.what).expanduser()
    source: list[Row] = []
    if not path.exists():
        path, source = _elsewhere(what, arguments.revision)
    elif arguments.revision is not None:
        raise ValueError(f"--revision is of a Hub repository, and {what} is a path here; leave one of them out")
    try:
        kind, facts, rows = _described(path)
    except (ValueError, FileNotFoundError) as error:
        # a path here is named as it is: "." stands in any sentence
        raise ValueError(str(error).replace(str(path), what) if source else str(error)) from error
    facts = {"kind": kind, "path": what, **{name.replace(" ", "_"): text for name, text in source}, **facts}
    return facts, rows_of([("what", kind), ("where", what), *source, *rows])


def _elsewhere(what: str, revision: str | None) -> tuple[Path, list[Row]]:
    """A rule that ships, or a repository of the Hub."""
    shipped = sorted(folder.name for folder in SHIPPED_RULES.iterdir() if folder.is_dir())
    if what in shipped:
        return SHIPPED_RULES / what, [("comes with", "the package")]
    if not is_hub_id(what) or "/" not in what or re.search(r"\.(safetensors|json)$", what):
        raise ValueError(f"WHAT is {what!r}: no file or folder here, no rule that ships ({', '.join(shipped)})")
    folder, commit = fetched(what, revision)
    return folder, [("commit", commit)]


def _described(path: Path) -> tuple[str, dict[str, Any], list[Row]]:
    """Its kind, facts for a program, and rows for a person."""
    if path.is_file():
        if path.name in (_TRAJECTORY, "config.json", _STATE):
            return _described(path.parent)
        if path.suffix == ".safetensors":
            return "safetensors", *about_tensors(path)
        if path.suffix == ".json" and _is_comparison(data := load_json(path, dict)):
            return "comparison", *about_comparison(path, data)
        raise ValueError(f"{path} is a file of another kind; {_EXPECTED}")
    if (path / _TRAJECTORY).is_file():
        return "trajectory", *about_trajectory(path)
    if (path / _STATE).is_file():
        return "checkpoint", *about_trainer(path)
    if (path / _COMPARISON).is_file():
        return _described(path / _COMPARISON)
    kind = kind_in(path)
    if kind == "basis":
        return kind, *about_basis(path)
    if kind == "fine-tune":
        return kind, *about_finetuned(path)
    if kind == "rule":
        facts, rows = about_rule(path)
        more, further = about_meta_training(path) if (path / MANIFEST).is_file() else ({}, [])
        return kind, {**facts, **more}, [*rows, *further]
    if (path / MANIFEST).is_file():
        return "meta-training", *about_meta_training(path)
    inner = sorted(place.parent for name in (_TRAJECTORY, "config.json", _STATE) for place in path.glob(f"*/{name}"))
    hint = f"; look into {', '.join(str(place) for place in inner[:3])}" if inner else ""
    raise ValueError(f"{path} is a folder of another kind; {_EXPECTED}{hint}")


def _is_comparison(data: dict[str, Any]) -> bool:
    return "recipe" in data and bool({"runs", "tasks", "cells"} & data.keys())
