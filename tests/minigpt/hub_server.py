"""A stand-in for the Hugging Face hub on 127.0.0.1: as much of its API as huggingface_hub and datasets ask for.

    GET, HEAD  [datasets/]OWNER/NAME/resolve/REVISION/FILE        a file, or its size and hash
    GET        api/datasets/OWNER/NAME/revision/REVISION          there is such a commit
    GET        api/datasets/OWNER/NAME/tree/REVISION/FOLDER       what is in a folder

Unlike the hub, it sends large files itself, and does not redirect to a storage server or to Xet.
"""

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

FILE = re.compile(r"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>\w+)/(?P<path>.+)")
API = re.compile(r"/api/(?P<repo>datasets/[^/]+/[^/]+)/(?P<call>revision|tree)/(?P<revision>\w+)/?(?P<path>.*)")


class Hub(ThreadingHTTPServer):
    """Repositories, each with a single commit.

    Attributes:
        repositories: "openai-community/gpt2" or "datasets/Salesforce/wikitext" -> its commit and its files.
        requests: what was asked for, as "GET /path".
        resumed: the first bytes that were asked for where a download was taken up again.
        broken: a status that every request is answered with, such as 500.
        breaks: how many more times the connection ends in the middle of a `model.safetensors`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, tuple[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.resumed: list[int] = []
        self.broken: int | None = None
        self.breaks = 0

    def bodies(self) -> list[str]:
        """The files whose contents were sent, without their folders."""
        return [line.rsplit("/", 1)[1] for line in self.requests if line.startswith("GET") and "/resolve/" in line]


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    protocol_version = "HTTP/1.1"  # without it, a client cannot tell a body that was cut short from a whole one
    server: Hub

    def handle_request(self) -> None:
        """GET and HEAD."""
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if self.server.broken:
            self.reply(self.server.broken, b"out of order")
        elif found := FILE.fullmatch(path):
            self.send_file(**found.groupdict())
        elif found := API.fullmatch(path):
            self.call_api(**found.groupdict())
        else:
            self.reply(404)

    do_GET = do_HEAD = handle_request

    def files_of(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """A repository's files; answers as the hub does, and gives None, if there is no such commit."""
        commit, files = self.server.repositories.get(repo, (None, {}))
        if commit != revision:
            self.reply(404, code="RevisionNotFound" if commit else "RepoNotFound")
            return None
        return files

    def send_file(self, repo: str, revision: str, path: str) -> None:
        """A file of a repository: from the byte that the client asks for, if it resumes a download."""
        files = self.files_of(repo, revision)
        if files is None:
            return
        if path not in files:
            self.reply(404, code="EntryNotFound")
            return
        body = files[path]
        headers = {"ETag": f'"{git_hash(body)}"', "X-Repo-Commit": revision}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if start:
            self.server.resumed.append(start)
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        cut = self.command == "GET" and path == "model.safetensors" and self.server.breaks > 0
        self.server.breaks -= cut
        self.reply(206 if start else 200, body[start:], headers, cut=cut)

    def call_api(self, repo: str, call: str, revision: str, path: str) -> None:
        """The commit, or the entries of a folder."""
        files = self.files_of(repo, revision)
        if files is None:
            return
        if call == "revision":
            answer = {"id": repo.removeprefix("datasets/"), "sha": revision, "siblings": []}
        else:
            answer = [entry for entry in entries(files) if entry["path"].rpartition("/")[0] == path]
        self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def reply(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, code: str = "", cut: bool = False
    ) -> None:
        """Sends a response; if `cut`, half of it, although the headers promise all."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet: `Hub.requests` has it all."""


def entries(files: dict[str, bytes]) -> list[dict[str, str | int]]:
    """A repository's files and folders as the hub lists them."""
    folders = sorted({path.rpartition("/")[0] for path in files} - {""})
    return [{"type": "directory", "path": path, "oid": git_hash(path.encode()), "size": 0} for path in folders] + [
        {"type": "file", "path": path, "oid": git_hash(body), "size": len(body)} for path, body in files.items()
    ]


def git_hash(body: bytes) -> str:
    """The hash that git, and so the hub, knows a file by."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that listens until the block ends."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port of 127.0.0.1 that refuses connections until the block ends: taken, and nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]
