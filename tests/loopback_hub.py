"""A Hub on the loopback device: repositories in memory, the requests huggingface_hub makes to push and load."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN, USER = "hf_test", "user"


class LoopbackHub(ThreadingHTTPServer):
    """`repos[id]` is a list of (commit, files); `log` holds "METHOD path" of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.log: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, repo: str, **files: bytes) -> str:
        """Commits files directly, as an attacker with access would; `__` in a keyword stands for a dot."""
        commits = self.repos.setdefault(repo, [])
        old = commits[-1][1] if commits else {}
        new = {**old, **{name.replace("__", "."): data for name, data in files.items()}}
        commit = hashlib.sha1(repr((repo, len(commits), sorted(new))).encode()).hexdigest()
        commits.append((commit, new))
        return commit


class Handler(BaseHTTPRequestHandler):
    server: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    @property
    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = unquote(self.path.split("?")[0])
        self.server.log.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if not self.authorised:
            return self.fail(401, "Unauthorized")
        if path == "/api/repos/create":
            data = json.loads(body)
            repo = f"{data.get('organization') or USER}/{data['name']}"
            if not repo.startswith(f"{USER}/"):
                return self.fail(403, "Forbidden")
            status = 409 if repo in self.server.repos else 200
            self.server.repos.setdefault(repo, [("0" * 40, {})])
            return self.answer(status, {"url": f"{self.server.endpoint}/{repo}", "id": repo, "name": repo})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/.+", path):
            files = json.loads(body)["files"]
            replies = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
            return self.answer(200, {"files": replies})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.+", path):
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            repo = match[1]
            commit = self.server.put(repo, **files)
            url = f"{self.server.endpoint}/{repo}/commit/{commit}"
            return self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})
        self.fail(404, "NotFound")

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.server.log.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            if not self.authorised:
                return self.fail(401, "Unauthorized")
            return self.answer(200, {"name": USER, "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path)
        found = match or info
        commits = self.server.repos.get(found[1]) if found else None
        if found is None or commits is None:
            return self.fail(401, "RepoNotFound")
        revision = found[2] or "main"
        chosen = commits[-1] if revision == "main" else next((c for c in commits if c[0] == revision), None)
        if chosen is None:
            return self.fail(404, "RevisionNotFound")
        commit, files = chosen
        if info and not match:
            siblings = [{"rfilename": name} for name in files]
            return self.answer(
                200, {"id": found[1], "sha": commit, "siblings": siblings, "tags": [], "private": False}
            )
        assert match is not None
        if match[3] not in files:
            return self.fail(404, "EntryNotFound")
        data = files[match[3]]
        tag = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        self.answer(200, data, X_Repo_Commit=commit, ETag=f'"{tag}"', Content_Length=str(len(data)))

    do_HEAD = do_GET


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    server = LoopbackHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
