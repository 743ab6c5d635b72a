"""Settings from the command line and from a file of them (YAML or JSON); the command line goes first."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..experiments.tasks.named import PROBLEMS, check_tasks
from ..foundation.files import load_json
from .words import known

_SUFFIXES = (".json", ".yaml", ".yml")
_LONGEST = 1 << 20


class _Loader(yaml.SafeLoader):
    """YAML without its surprises: `1e-3` is a number, and no key is there twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    pairs = [(loader.construct_object(key, deep=True), value) for key, value in node.value]
    names = [name for name, _ in pairs]
    for name in names:
        if not isinstance(name, str) or names.count(name) > 1:
            what = "is there twice" if isinstance(name, str) else "is no name"
            raise ValueError(f"the key {name!r} {what}")
    return {name: loader.construct_object(value, deep=True) for name, value in pairs}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds --config."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as YAML or JSON; options go first")


def read_settings(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Returns the settings in a file, `-` in a name as `_`.

    Args:
        path (`Path`): YAML or JSON, an object.
        names (`Sequence[str]`): What may be set.

    Raises:
        `ValueError`: there is no such file, it is no YAML or JSON, or sets something else (the closest name is said).
    """
    if not path.is_file() or path.suffix not in _SUFFIXES:
        found = f"a file that ends in {path.suffix!r}" if path.is_file() else "not there"
        raise ValueError(f"--config is {path}, which is {found}; give a .yaml or .json file")
    if path.suffix == ".json":
        data = load_json(path, dict)
    else:
        try:
            if path.stat().st_size > _LONGEST:
                raise ValueError(f"it has more than {_LONGEST} bytes")
            data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict):
            raise ValueError(f"--config {path} holds a {type(data).__name__}, expected `name: value` lines")
    settings = {str(key).replace("-", "_"): value for key, value in data.items()}
    if len(settings) < len(data):
        raise ValueError(f"--config {path} sets a name twice, once with - and once with _; leave one out")
    for key in settings:
        known(f"a setting in {path}", key, names)
    return settings


def merged(arguments: argparse.Namespace, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns each setting: from the command line (where its default is None), else from --config, else `defaults`."""
    given = {name: value for name in defaults if (value := getattr(arguments, name)) is not None}
    file = {} if arguments.config is None else read_settings(arguments.config, list(defaults))
    return {**defaults, **file, **given}


def check_names(value: Any, name: str) -> list[str]:
    """Returns a list of names from a setting; raises `ValueError` where it is none, is empty, or has one twice."""
    if not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"{name} is {value!r}, expected a list of at least one name")
    for entry in value:
        if value.count(entry) > 1:
            raise ValueError(f"{name} has {entry!r} twice; leave one out")
    return value


def check_task_names(names: Sequence[str], data: str) -> None:
    """Raises `ValueError` for a task that is not built in, with the closest name, or whose data is not there."""
    try:
        check_tasks(names, data)
    except ValueError as error:
        for name in names:
            problem = re.sub(r"(-lora\d.*|-full.*|-pca|@.*)$", "", name)
            if problem not in PROBLEMS and (close := difflib.get_close_matches(problem, list(PROBLEMS), n=1)):
                raise ValueError(f"{error}; did you mean {close[0]!r}?") from error
        raise
