"""A hub of the tests' own: the part of the Hugging Face hub's HTTP API by which models are downloaded.

GET  /api/models/{owner}/{name}[/revision/{revision}]          the commit
GET  /api/models/{owner}/{name}/tree/{commit}?recursive=True   its files
HEAD /{owner}/{name}/resolve/{commit}/{file}                   size, ETag, X-Repo-Commit
GET  /{owner}/{name}/resolve/{commit}/{file}                   the bytes, ranges included
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repo:
    commits: dict[str, Files]
    """{commit: {path: content}}."""
    branches: dict[str, str]
    """{branch or tag: commit}."""
    gated: bool = False
    withheld: set[str] = field(default_factory=set)
    """Files that are listed and then not given out."""


class Hub:
    """Runs in a thread inside a `with`; `log` is the requests it was asked, as `METHOD path`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.log: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, name: str, files: Files, branch: str = "main") -> str:
        """Commit `files` to a branch; returns the commit."""
        commit = hashlib.sha1(repr((name, branch, sorted(files.items()))).encode()).hexdigest()
        repo = self.repos.setdefault(name, Repo({}, {}))
        repo.commits[commit] = files
        repo.branches[branch] = commit
        return commit

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer()

            def do_GET(self) -> None:
                self._answer()

            def log_message(self, *_args: object) -> None:
                pass

            def _answer(self) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.log.append(f"{self.command} {path}")
                match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+?))?", path)
                if match:
                    return self._describe(match[1], match[2], match[3] or "main")
                match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
                if match:
                    return self._file(match[1], match[2], match[3])
                return self._fail(404, "EntryNotFound")

            def _find(self, name: str, revision: str) -> tuple[Repo, str] | None:
                repo = hub.repos.get(name)
                commit = repo and repo.branches.get(revision, revision)
                if repo is None:
                    self._fail(401, "RepoNotFound")  # as the real one answers a stranger
                elif commit not in repo.commits:
                    self._fail(404, "RevisionNotFound")
                else:
                    return repo, commit or ""
                return None

            def _describe(self, name: str, what: str | None, revision: str) -> None:
                if (found := self._find(name, revision)) is None:
                    return
                repo, commit = found
                files = repo.commits[commit]
                if what == "tree":
                    listing = [
                        {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                        for p, c in files.items()
                    ]
                    return self._send(200, json.dumps(listing).encode())
                siblings = [{"rfilename": path} for path in files]
                info = {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
                self._send(200, json.dumps(info).encode())

            def _file(self, name: str, revision: str, path: str) -> None:
                if (found := self._find(name, revision)) is None:
                    return
                repo, commit = found
                if repo.gated:
                    return self._fail(403, "GatedRepo")
                if path in repo.withheld or path not in repo.commits[commit]:
                    return self._fail(404, "EntryNotFound")
                content = repo.commits[commit][path]
                headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
                wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                if wanted:
                    start = int(wanted[1])
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                    return self._send(206, content[start:], headers)
                return self._send(200, content, headers)

            def _fail(self, status: int, code: str) -> None:
                self._send(status, b'{"error": "no"}', {"X-Error-Code": code, "X-Error-Message": "no"})

            def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        return Handler
