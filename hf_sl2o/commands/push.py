"""Uploads a rule, a basis or a fine-tune to the Hugging Face Hub, checked first, as one commit.

    hf-sl2o push my-rule user/my-rule --private

The token is taken from HF_TOKEN, or from `hf auth login`. The repository is made where there is none. Only the files
that belong to the rule, basis or fine-tune are uploaded. A README.md that somebody wrote is kept, here and on the Hub.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError

from ..foundation import remote
from .kinds import fingerprint_of, is_hub_id, load_checked
from .words import human_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="as save_pretrained wrote it")
    parser.add_argument("repo", metavar="REPO", help="user/name on the Hub")
    parser.add_argument("--private", action="store_true", help="nobody else may see the repository")
    parser.add_argument("--revision", metavar="BRANCH", help="a branch, which is made where there is none (main)")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Checks the folder, and uploads it."""
    folder, repo = arguments.folder, arguments.repo
    if not folder.is_dir():
        found = "a file" if folder.is_file() else "not there"
        raise ValueError(f"FOLDER is {folder}, which is {found}; give the folder that save_pretrained wrote")
    if not is_hub_id(repo):
        raise ValueError(f"REPO is {repo!r}, expected the id of a repository of the Hub, user/name")
    loaded = load_checked(folder)
    if get_token() is None:
        raise ValueError("there is no token of the Hub: set HF_TOKEN, or log in with `hf auth login`")
    with TemporaryDirectory() as made:
        for name in loaded.files:
            _link((folder / name).absolute(), Path(made) / name)
        # None: the user's or organization's own choice
        url = remote.push(
            Path(made), repo, private=True if arguments.private else None, branch=arguments.revision,
            commit_message=f"Push a {loaded.kind} with hf_sl2o",
        )  # fmt: skip
    size = sum((folder / name).stat().st_size for name in loaded.files)
    entries = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    left_out = sorted(name for name in entries - set(loaded.files) if not name.startswith("."))
    commit = url.rstrip("/").rpartition("/")[2]
    facts = {
        "repo": repo, "commit": commit, "url": url, "private": _is_private(repo),
        "kind": loaded.kind, "files": list(loaded.files), "left_out": left_out, "bytes": size,
        "fingerprint": fingerprint_of(loaded),
    }  # fmt: skip
    seen = {True: " (private)", False: " (public)", None: ""}[facts["private"]]
    text = f"{repo}{seen}: a {loaded.kind} of {human_bytes(size)} in {len(loaded.files)} files.\n{url}"
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        text += f"\nNot uploaded, as no part of the {loaded.kind}: {', '.join(left_out[:3])}{more}."
    return facts, text


def _is_private(repo: str) -> bool | None:
    """None where the Hub does not say."""
    try:
        return bool(HfApi().model_info(repo).private)
    except (HTTPError, OSError):
        return None


def _link(source: Path, target: Path) -> None:
    """Puts a file in another folder; a basis of many gigabytes is not copied where there are links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.symlink(source, target)
    except OSError:
        shutil.copyfile(source, target)
