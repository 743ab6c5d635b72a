"""Repositories in memory, as the Hub keeps them: commits, branches, tags, and large files by their sha256."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from typing import Any

Files = dict[str, bytes]
FIRST = "0" * 40


class Refused(Exception):
    """What the server answers instead: a status, the Hub's word for it, and a text."""

    def __init__(self, status: int, code: str, text: str = "") -> None:
        super().__init__(text or code)
        self.status, self.code, self.text = status, code, text or code


class Repo(list[tuple[str, Files]]):
    """All commits, oldest first, as (commit, files); `branches` and `tags` map names to commits."""

    def __init__(self, name: str, private: bool = False) -> None:
        super().__init__([(FIRST, {})])
        self.name, self.private = name, private
        self.branches, self.tags = {"main": FIRST}, dict[str, str]()

    @property
    def owner(self) -> str:
        return self.name.split("/")[-2]

    def at(self, revision: str) -> tuple[str, Files]:
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        for known, files in self:
            if known == commit:
                return known, files
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def add(self, files: Files, branch: str = "main") -> str:
        commit = hashlib.sha1(repr((self.name, len(self), sorted(files))).encode()).hexdigest()
        self.append((commit, files))
        self.branches[branch] = commit
        return commit

    def name_ref(self, refs: dict[str, str], name: str, start: str) -> None:
        if name in refs:
            raise Refused(409, "Conflict", f"the reference {name} exists already")
        refs[name] = self.at(start)[0]

    def drop_ref(self, refs: dict[str, str], name: str) -> None:
        if refs.pop(name, None) is None:
            raise Refused(404, "RevisionNotFound", f"there is no reference {name}")

    def commit(self, branch: str, lines: Iterable[dict[str, Any]], large: Files) -> str:
        """Applies the lines of a commit to a branch, all of them or none."""
        if branch not in self.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        parent, old = self.at(branch)
        new = dict(old)
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit", parent) != parent:
                    raise Refused(412, "PreconditionFailed", "A commit has happened since. Please refresh.")
            elif line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif line["key"] == "lfsFile":
                if value["oid"] not in large:
                    raise Refused(400, "BadRequest", f"LFS pointer pointed to a file that does not exist: {value}")
                new[value["path"]] = large[value["oid"]]
            elif line["key"] == "deletedFile":
                if new.pop(value["path"], None) is None:
                    raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            elif line["key"] == "deletedFolder":
                inside = [name for name in new if name.startswith(value["path"].rstrip("/") + "/")]
                for name in inside:
                    del new[name]
            else:
                raise Refused(400, "BadRequest", f"unknown operation {line['key']}")
        return self.add(new, branch)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tree(files: Files, folder: str, recursive: bool, large: Files) -> list[dict[str, Any]]:
    """Lists what is in a folder, as the Hub's tree does."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, data in sorted(files.items()):
        if not name.startswith(prefix):
            continue
        parts = name[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            path = prefix + "/".join(parts[:depth])
            entries[path] = {"type": "directory", "path": path, "oid": git_oid(path.encode())}
        if recursive or len(parts) == 1:
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
            if (oid := sha256(data)) in large:
                entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
            entries[name] = entry
    if folder and not entries:
        raise Refused(404, "EntryNotFound", f"{folder} does not exist")
    return list(entries.values())
