"""A Hub over HTTP for the unmodified client to read from: private repos in memory, and a log of requests."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_harbourharbour"


class FakeHub:
    """Serves `repos`: {(kind, "owner/name"): {path: bytes}} with kind `models` or `datasets`; all private."""

    def __init__(self, repos: dict[tuple[str, str], dict[str, bytes]]) -> None:
        self.repos, self.log = repos, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.answer(self)

            do_GET = do_POST = do_HEAD  # noqa: N815 - the names that http.server calls

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sha(self, kind: str, name: str) -> str:
        """The commit of a repository: it has one."""
        return hashlib.sha1(json.dumps(sorted(self.repos[kind, name])).encode()).hexdigest()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        path, query = unquote(parts.path).strip("/"), parse_qs(parts.query)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0)).decode()
        self.log.append((request.command, path))
        api = path.startswith("api/")
        steps = path.removeprefix("api/").split("/")
        kind = steps.pop(0) if steps[0] in ("models", "datasets") else "models"
        name = "/".join(steps[:2])
        if (kind, name) not in self.repos or request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        files, sha = self.repos[kind, name], self.sha(kind, name)
        if not api:  # owner/name/resolve/REVISION/path
            return _file(request, files.get("/".join(steps[4:])), sha)
        verb = steps[2] if len(steps) > 2 else "revision"
        if verb == "revision":
            siblings = [{"rfilename": n, "size": len(c)} for n, c in files.items()]
            return _json(request, {"id": name, "sha": sha, "private": True, "siblings": siblings, "tags": []})
        entries = [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in files.items()]
        if verb == "tree":
            return _json(request, _children(entries, "/".join(steps[4:]), query.get("recursive") == ["true"]))
        wanted = parse_qs(body).get("paths", query.get("paths", []))  # paths-info
        return _json(request, [e for e in entries if e["path"] in wanted])


def _children(entries: list[dict], folder: str, recursive: bool) -> list[dict]:
    inside = [e for e in entries if e["path"].startswith(f"{folder}/" if folder else "")]
    depth = folder.count("/") + 2 if folder else 1
    folders = {"/".join(e["path"].split("/")[:depth]) for e in inside if e["path"].count("/") >= depth}
    shown = inside if recursive else [e for e in inside if e["path"].count("/") < depth]
    return [*({"type": "directory", "path": f, "oid": _oid(f.encode())} for f in sorted(folders)), *shown]


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _file(request: BaseHTTPRequestHandler, content: bytes | None, sha: str) -> None:
    if content is None:
        return _send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
    headers = {"X-Repo-Commit": sha, "ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"}
    wanted = request.headers.get("Range")
    if not wanted:
        return _send(request, 200, content, headers)
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start, end = int(first), min(int(last or len(content)), len(content) - 1)
    headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
    return _send(request, 206, content[start : end + 1], headers)


def _json(request: BaseHTTPRequestHandler, value: object) -> None:
    _send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _send(request: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str]) -> None:
    request.send_response(status)
    for key, value in (headers | {"Content-Length": str(len(content))}).items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)
