"""Rules, bases and fine-tunes: which one a folder or a repository of the Hub holds, loaded with all checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

from ..foundation.cards import FIGURE, README
from ..foundation.files import load_json
from ..foundation.hub import CONFIG, WEIGHTS
from ..foundation.remote import Repository, why
from ..rules import Rule
from ..subspace import Basis
from ..training.finetuned import BASIS, RULE, FineTune, in_units_of
from ..training.sharing import SHARED

#: What is pushed and pulled of each kind, where it is there; nothing else is asked for.
_OWN = (CONFIG, WEIGHTS, README, FIGURE)
FILES = {
    "basis": _OWN,
    "rule": (*_OWN, "provenance.json"),
    "fine-tune": (*_OWN, *(f"{BASIS}/{name}" for name in _OWN), *(f"{RULE}/{name}" for name in _OWN)),
}
EXPECTED = "expected a rule, a basis or a fine-tune of hf_sl2o, as save_pretrained writes it"
_KEYS = {"basis": "basis", "rule": "rule", "finetuned": "fine-tune"}
# Kinds of bases that can be read from their file, without memory for them.
_MAPPED = ("dense", "quantized")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Loaded(NamedTuple):
    """What a folder holds: its kind, the object, and the files that belong to it."""

    kind: str
    made: Any
    files: tuple[str, ...]


def kind_in(folder: Path) -> str | None:
    """Returns `"basis"`, `"rule"` or `"fine-tune"` as config.json says; None: it says none of them."""
    if not (folder / CONFIG).is_file():
        return None
    config = load_json(folder / CONFIG, dict)
    return next((kind for key, kind in _KEYS.items() if key in config), None)


def load_checked(folder: Path, name: str = "") -> Loaded:
    """Loads what a folder holds, and checks it as `from_pretrained` does; a fine-tune with its basis and rule.

    Args:
        folder (`Path`): As `save_pretrained` wrote it.
        name (`str`, *optional*): What messages call it instead of its path.

    Raises:
        `ValueError`: it holds none of the three, or one that is damaged.
    """
    try:
        kind = kind_in(folder)
        if kind is None:
            found = "whose config.json is of something else" if (folder / CONFIG).is_file() else "without config.json"
            raise ValueError(f"{folder} is a folder {found}; {EXPECTED}")
        if kind == "rule":
            made: Any = Rule.from_pretrained(folder)
        else:
            made = load_basis(folder) if kind == "basis" else _finetuned(folder)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(str(error).replace(str(folder), name or str(folder))) from error
    return Loaded(kind, made, tuple(file for file in FILES[kind] if (folder / file).is_file()))


def load_basis(folder: Path) -> Basis:
    """As `Basis.from_pretrained`, without memory for directions that can stay in their file."""
    return Basis.from_pretrained(folder, mapped=load_json(folder / CONFIG, dict).get("basis") in _MAPPED)


def _finetuned(folder: Path) -> FineTune:
    """With its basis and rule, where they lie beside it; raises `ValueError` where they are others."""
    made: FineTune = FineTune.from_pretrained(folder)
    if made.origin.basis_id is None:
        made.basis = in_units_of(made.origin.basis, made.origin.basis_dtype, load_basis(folder / BASIS))
    if (folder / RULE).is_dir():
        made.rule = Rule.from_pretrained(folder / RULE)
        if made.rule.fingerprint != made.origin.rule:
            raise ValueError(
                f"{folder / RULE} holds the rule {made.rule.fingerprint}, config.json in {folder} says "
                f"{made.origin.rule}; restore both from one source"
            )
    return made


def fingerprint_of(loaded: Loaded) -> str:
    """What tells the object from others of its kind; of a fine-tune the sha256 of its weights."""
    return str(loaded.made.origin.weights if loaded.kind == "fine-tune" else loaded.made.fingerprint)


# The Hub


def is_hub_id(text: str) -> bool:
    """Whether `text` could be the id of a repository: `user/name` or `name`."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text and not text.startswith((".", "-"))


def _has(repository: Repository, name: str) -> bool:
    try:
        repository.file(name)
    except FileNotFoundError:
        return False
    return True


def fetched(repo: str, revision: str | None) -> tuple[Path, str]:
    """Brings the files of what a repository holds, also in `sl2o`, into the Hub's cache; returns folder and commit.

    Raises:
        `ValueError`: there is no such repository or revision, it may not be read, or it holds something else.
        `ConnectionError`: the Hub does not answer, and the cache has no copy.
    """
    repository = Repository(repo, "rule, basis or fine-tune", revision)
    try:
        folder = repository.file(CONFIG).parent
    except FileNotFoundError as error:
        refused = repository.asks or isinstance(repository.fault, RepositoryNotFoundError)
        kind = ValueError if refused else ConnectionError
        raise kind(str(error)) from error
    found, commit, inside = kind_in(folder), folder.name, ""
    if found is None and _has(repository, f"{SHARED}/{CONFIG}"):  # beside a Trainer's weights
        found, inside = kind_in(folder / SHARED), SHARED
    if found is None:
        raise ValueError(f"config.json of the repository {repo} is of something else; {EXPECTED}")
    try:
        wanted = [f"{inside}/{name}" if inside else name for name in FILES[found]]
        there = snapshot_download(repo, revision=commit, local_files_only=not repository.asks, allow_patterns=wanted)
        return Path(there) / inside, commit
    except (HTTPError, OSError) as error:
        lost = f"the {found} of {repo} could not be had as a whole: {why(error, None)}"
        raise ConnectionError(lost) from error
