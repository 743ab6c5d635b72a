"""A Hub on the loopback device: repositories in memory, the requests that huggingface_hub makes to push and load.

It was written from the client's source and has only ever spoken to that client; tests/test_hub_live.py asks the Hub.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .loopback_repos import Files, Refused, Repo, git_oid, sha256, tree

TOKEN, USER = "hf_test", "user"
OTHER_TOKEN, OTHER = "hf_other", "other"
_USERS = {TOKEN: USER, OTHER_TOKEN: OTHER}

_NAME = r"(?:(datasets|spaces|models)/)?([^/]+/[^/]+?)"
_YAML = re.compile(r"^\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


class LoopbackHub(ThreadingHTTPServer):
    """A server that speaks the Hub's protocol.

    Attributes:
        repos: By id a list of (commit, files), [`Repo`]; data sets and spaces are at `"datasets/user/name"`.
        log: "METHOD path" of each request.
        lfs: Whether files that are not text go by LFS; a client with hf_xet needs HF_HUB_DISABLE_XET=1 for that.
        cuts: By file name, after how many bytes the connection is closed, one a download until none is left.
        delay: Seconds before each answer.
        down: A status that every request is answered with.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.large: Files = {}
        self.log: list[str] = []
        self.lfs = False
        self.cuts: dict[str, list[int]] = {}
        self.delay = 0.0
        self.down: int | None = None
        self._connections: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, Any]:
        found = super().get_request()
        self._connections.append(found[0])
        return found

    def stop(self) -> None:
        """Is gone, for connections that are kept open, too."""
        self.shutdown()
        self.server_close()
        for connection in self._connections:
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no fault of ours."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def storage(self) -> str:
        """Another host, as the Hub's large files are on one: a client must not send its token there."""
        return f"http://localhost:{self.server_address[1]}"

    def put(self, repo: str, private: bool = False, **files: bytes) -> str:
        """Commits files to main directly, as somebody with access would; `__` in a keyword is a dot."""
        made = self.repos.setdefault(repo, Repo(repo, private))
        return made.add({**made.at("main")[1], **{name.replace("__", "."): data for name, data in files.items()}})


class Handler(BaseHTTPRequestHandler):
    server: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    # Answers

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content_Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, error: Refused) -> None:
        self.answer(error.status, {"error": error.text}, X_Error_Code=error.code, X_Error_Message=error.text)

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        body = self.read_body()
        self.server.log.append(f"{self.command} {path}")
        time.sleep(self.server.delay)
        try:
            if self.server.down is not None:
                raise Refused(self.server.down, "Down", "the Hub is down")
            for pattern, method in _ROUTES:
                verb, _, rest = pattern.partition(" ")
                if self.command in verb.split("|") and (match := re.fullmatch(rest, url.path)):
                    found = (None if group is None else unquote(group) for group in match.groups())
                    return getattr(self, method)(*found, body=body, query=query)
            raise Refused(404, "NotFound", f"no such page: {self.command} {path}")
        except Refused as error:
            self.fail(error)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # Who asks, and for what

    def user(self, needed: bool = True) -> str | None:
        """Who asks; a token that is none is refused even where none is needed."""
        sent = self.headers.get("Authorization")
        if sent is None:
            if needed:
                raise Refused(401, "Unauthorized", "Invalid username or password.")
            return None
        if (user := _USERS.get(sent.removeprefix("Bearer "))) is None:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return user

    def repo(self, kind: str | None, name: str, write: bool = False) -> Repo:
        user = self.user(needed=write)
        found = self.server.repos.get(name if kind in (None, "models") else f"{kind}/{name}")
        if found is None or (found.private and found.owner != user):
            raise Refused(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and found.owner != user:
            raise Refused(403, "Forbidden", f"You don't have the rights to write to {name}")
        return found

    # Pages

    def whoami(self, *, body: bytes, query: Any) -> None:
        self.answer(200, {"name": self.user(), "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def validate(self, *, body: bytes, query: Any) -> None:
        match = _YAML.match(json.loads(body)["content"])
        warnings, errors = [], []
        if match is None:
            warnings.append("empty or missing yaml metadata in repo card")
        else:
            try:
                data = yaml.safe_load(match[1])
                if not isinstance(data, dict):
                    errors.append("the metadata is no mapping")
                elif not isinstance(data.get("license", ""), str | list):
                    errors.append('"license" must be a string')
                elif not isinstance(data.get("tags", []), list):
                    errors.append('"tags" must be an array')
            except yaml.YAMLError as error:
                errors.append(f"Metadata YAML is invalid: {error}")
        told = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
        self.answer(400 if errors else 200, told)

    def create(self, *, body: bytes, query: Any) -> None:
        user, data = self.user(), json.loads(body)
        name = f"{data.get('organization') or user}/{data['name']}"
        if not name.startswith(f"{user}/"):
            raise Refused(403, "Forbidden", f"You don't have the rights to create a model under {name}")
        kind = data.get("type") or "model"
        key = name if kind == "model" else f"{kind}s/{name}"
        status = 409 if key in self.server.repos else 200
        self.server.repos.setdefault(key, Repo(key, data.get("visibility") == "private"))
        self.answer(status, {"url": f"{self.server.endpoint}/{key}", "id": name, "name": name})

    def delete(self, *, body: bytes, query: Any) -> None:
        data = json.loads(body)
        kind = data.get("type") or "model"
        name = f"{data.get('organization') or self.user()}/{data['name']}"
        del self.server.repos[self.repo(f"{kind}s", name, write=True).name]
        self.answer(200)

    def preupload(self, kind: str, name: str, revision: str, *, body: bytes, query: Any) -> None:
        repo = self.repo(kind, name, write=True)
        known = repo.at(revision)[1]
        replies = []
        for file in json.loads(body)["files"]:
            text = file["path"].endswith((".md", ".json", ".txt", ".gitattributes"))
            mode = "lfs" if self.server.lfs and not text else "regular"
            old = known.get(file["path"])
            oid = None if old is None else (sha256(old) if mode == "lfs" else git_oid(old))
            replies.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": replies})

    def lfs_batch(self, kind: str | None, name: str, *, body: bytes, query: Any) -> None:
        self.repo(kind, name, write=True)
        objects = []
        for entry in json.loads(body)["objects"]:
            if entry["oid"] not in self.server.large:
                target = {"href": f"{self.server.storage}/lfs/{entry['oid']}"}
                verify = {"href": f"{self.server.endpoint}/lfs-verify"}
                entry = {**entry, "actions": {"upload": target, "verify": verify}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str, *, body: bytes, query: Any) -> None:
        if "Authorization" in self.headers:
            raise Refused(400, "InvalidArgument", "Only one auth mechanism allowed")
        if sha256(body) != oid:
            raise Refused(400, "BadDigest", "the content is not what was announced")
        self.server.large[oid] = body
        self.answer(200)

    def lfs_verify(self, *, body: bytes, query: Any) -> None:
        self.user()
        data = json.loads(body)
        if len(self.server.large.get(data["oid"], b"")) != data["size"]:
            raise Refused(404, "NotFound", "the file did not arrive")
        self.answer(200)

    def commit(self, kind: str, name: str, revision: str, *, body: bytes, query: Any) -> None:
        repo = self.repo(kind, name, write=True)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        answer: dict[str, Any] = {"success": True}
        if query.get("create_pr") == ["1"]:
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repo.branches)
            repo.branches[f"refs/pr/{number}"] = repo.at(revision)[0]
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.server.endpoint}/{repo.name}/discussions/{number}"
        commit = repo.commit(revision, lines, self.server.large)
        self.answer(
            200, {**answer, "commitOid": commit, "commitUrl": f"{self.server.endpoint}/{name}/commit/{commit}"}
        )

    def info(self, kind: str, name: str, revision: str | None, *, body: bytes, query: Any) -> None:
        repo = self.repo(kind, name)
        commit, files = repo.at(revision or "main")
        siblings = [{"rfilename": path} for path in files]
        facts = {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": repo.private}
        self.answer(200, facts)

    def list_tree(self, kind: str, name: str, revision: str, folder: str | None, *, body: bytes, query: Any) -> None:
        files = self.repo(kind, name).at(revision)[1]
        recursive = query.get("recursive", [""])[0].lower() in ("1", "true")
        self.answer(200, tree(files, folder or "", recursive, self.server.large))

    def list_refs(self, kind: str, name: str, *, body: bytes, query: Any) -> None:
        repo = self.repo(kind, name)

        def listed(refs: dict[str, str], where: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{where}/{n}", "targetCommit": c} for n, c in refs.items()]

        branches = {name: commit for name, commit in repo.branches.items() if not name.startswith("refs/")}
        tags = listed(repo.tags, "tags")
        self.answer(200, {"branches": listed(branches, "heads"), "tags": tags, "converts": []})

    def branch(self, kind: str, name: str, branch: str, *, body: bytes, query: Any) -> None:
        repo = self.repo(kind, name, write=True)
        if self.command == "DELETE":
            repo.drop_ref(repo.branches, branch)
        else:
            repo.name_ref(repo.branches, branch, json.loads(body or b"{}").get("startingPoint", "main"))
        self.answer(200)

    def tag(self, kind: str, name: str, revision: str, *, body: bytes, query: Any) -> None:
        repo = self.repo(kind, name, write=True)
        if self.command == "DELETE":
            repo.drop_ref(repo.tags, revision)
        else:
            repo.name_ref(repo.tags, json.loads(body)["tag"], revision)
        self.answer(200)

    # Downloads

    def resolve(self, kind: str | None, name: str, revision: str, path: str, *, body: bytes, query: Any) -> None:
        commit, files = self.repo(kind, name).at(revision)
        if path not in files:
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        data = files[path]
        if (oid := sha256(data)) in self.server.large:
            place = f"{self.server.storage}/lfs/{oid}/{path}"
            linked = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(data))}
            return self.answer(302, b"", Location=place, X_Repo_Commit=commit, ETag=f'"{git_oid(data)}"', **linked)
        self.send_data(path, data, X_Repo_Commit=commit, ETag=f'"{git_oid(data)}"')

    def lfs_get(self, oid: str, path: str, *, body: bytes, query: Any) -> None:
        if "Authorization" in self.headers:
            raise Refused(400, "InvalidArgument", "Only one auth mechanism allowed")
        if oid not in self.server.large:
            raise Refused(404, "NoSuchKey")
        self.send_data(path, self.server.large[oid])

    def send_data(self, path: str, data: bytes, **headers: str) -> None:
        """Sends a file, or the part asked for; hangs up in the middle where `cuts` says so."""
        start = int(match[1]) if (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        part = data[start:]
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cuts = self.server.cuts.get(path)
        if self.command == "GET" and cuts:
            self.send_response(206 if start else 200)
            for name, value in {**headers, "Content_Length": str(len(part))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(part[: cuts.pop(0)])
            self.close_connection = True
            return
        self.answer(206 if start else 200, part, **headers)


_ROUTES = (
    ("GET /api/whoami-v2", "whoami"),
    ("POST /api/validate-yaml", "validate"),
    ("POST /api/repos/create", "create"),
    ("DELETE /api/repos/delete", "delete"),
    (rf"POST /api/{_NAME}/preupload/(.+)", "preupload"),
    (rf"POST /api/{_NAME}/commit/(.+)", "commit"),
    (rf"POST|DELETE /api/{_NAME}/branch/(.+)", "branch"),
    (rf"POST|DELETE /api/{_NAME}/tag/(.+)", "tag"),
    (rf"GET /api/{_NAME}/refs", "list_refs"),
    (rf"GET /api/{_NAME}/tree/([^/]+)(?:/(.+))?", "list_tree"),
    (rf"GET /api/{_NAME}(?:/revision/(.+))?", "info"),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"POST /lfs-verify", "lfs_verify"),
    (r"PUT /lfs/([0-9a-f]{64})", "lfs_put"),
    (r"GET|HEAD /lfs/([0-9a-f]{64})/(.+)", "lfs_get"),
    (rf"GET|HEAD /{_NAME}/resolve/([^/]+)/(.+)", "resolve"),
)


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    server = LoopbackHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
