"""Downloads a rule, a basis or a fine-tune from the Hugging Face Hub into a folder, checked.

    hf-sl2o pull user/my-rule my-rule

Of a repository that a Trainer pushed it is the fine-tune beside the weights, which are not downloaded.

A token for private repositories is taken from HF_TOKEN, or from `hf auth login`. Nothing from a repository is
executed, and only files that belong to one of the three are asked for. The folder appears when all is there and
found to be whole.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from .folders import check_new, made_whole
from .kinds import fetched, fingerprint_of, is_hub_id, load_checked
from .words import human_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="REPO", help="user/name on the Hub")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the folder; a new one")
    parser.add_argument("--revision", metavar="NAME", help="a branch, a tag or a commit (main)")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Downloads, checks and copies."""
    repo, output = arguments.repo, arguments.output
    if not is_hub_id(repo):
        raise ValueError(f"REPO is {repo!r}, expected the id of a repository of the Hub, user/name")
    check_new("OUTPUT", output)
    cached, commit = fetched(repo, arguments.revision)
    loaded = load_checked(cached, repo)
    with made_whole("OUTPUT", output) as folder:
        for name in loaded.files:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(cached / name, folder / name)
        load_checked(folder, str(output))
    size = sum((output / name).stat().st_size for name in loaded.files)
    facts = {
        "repo": repo, "commit": commit, "kind": loaded.kind, "output": str(output), "files": list(loaded.files),
        "bytes": size, "fingerprint": fingerprint_of(loaded),
    }  # fmt: skip
    return facts, f"{output}: the {loaded.kind} of {repo} at {commit[:12]}, {human_bytes(size)}, checked."
