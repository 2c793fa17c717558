"""A Hub over HTTP that the unmodified huggingface_hub client and `datasets` talk to, through HF_ENDPOINT.

Everything lies in memory. `faults` holds what shall go wrong, `log` each request as (method, path), `cdn_tokens` every
Authorization header that reached the other origin (there must be none).
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.fakehub.buckets import Buckets
from tests.fakehub.faults import Fault, Faults, flipped
from tests.fakehub.jobs import list_hardware
from tests.fakehub.store import Refused, Repo, entry, is_lfs, tree, xet_hashes

TOKEN, USER = "hf_harbourharbour", "harbour"
READ_ONLY = "hf_lookbutdonttouch"
ONE_REPOSITORY = "hf_onlythisonerock"  # a fine-grained token: reads all, and writes to harbour/seal alone
CHUNK = 1 << 20  # parts of a multipart upload
KINDS = ("models", "datasets", "spaces")


class FakeHub:
    """Serves `repos`: {(kind, "owner/name"): {path: bytes}} with kind `models` or `datasets`; all private."""

    def __init__(self, repos: dict[tuple[str, str], dict[str, bytes]] | None = None, xet: Path | None = None) -> None:
        self.repos = {key: Repo(True, files) for key, files in (repos or {}).items()}
        self.faults, self.log, self.cdn_tokens = Faults(), [], []
        self.xet = xet  # a folder for hf_xet's local store
        self.jobs: Any = None  # a tests.fakehub.jobs.Jobs
        self.buckets = Buckets()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        port = self._server.server_port
        self.url, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def empty(self) -> None:
        """As new: no repositories, no faults, nothing logged."""
        self.repos.clear()
        self.faults.clear()
        self.log.clear()
        self.cdn_tokens.clear()
        self.jobs = None
        self.buckets.empty()

    def add(self, kind: str, name: str, files: dict[str, bytes] | None = None) -> Repo:
        self.repos[kind, name] = Repo(True, files)
        return self.repos[kind, name]

    def files(self, name: str, kind: str = "models") -> dict[str, Any]:
        """The newest commit's files."""
        return self.repos[kind, name].commits[-1].files

    def put(self, name: str, files: dict[str, bytes | None], kind: str = "models") -> None:
        """A commit from elsewhere: new contents, None for a file that goes."""
        repo = self.repos[kind, name]
        kept = {p: b for p, b in repo.commits[-1].files.items() if files.get(p, b"") is not None}
        repo.record("from elsewhere", kept | {p: repo.blob(p, c) for p, c in files.items() if c is not None})

    def sha(self, kind: str, name: str) -> str:
        return self.repos[kind, name].commits[-1].sha

    def contents(self) -> dict[str, bytes]:
        """Every byte that was ever uploaded, by a name, for a search through all of them."""
        found = {}
        for (_, name), repo in self.repos.items():
            for commit in repo.commits:
                found[f"{name}@{commit.sha} title"] = commit.title.encode()
                found |= {
                    f"{name}@{commit.sha}/{p}": b.content for p, b in commit.files.items() if b.content is not None
                }
        return found


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        pass  # a client that went away, which the tests make happen on purpose


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, and the second would wait 40 ms
    fault: Fault | None

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {k: v[0] for k, v in parse_qs(parts.query).items()}
        body = self._body()
        self.hub.log.append((self.command, path.strip("/")))
        self.fault = self.hub.faults.strike(f"{self.command} {path}")
        if self.fault and isinstance(self.fault.kind, int):
            return self._send(self.fault.kind, b"a fault", self.fault.headers)
        if self.fault and self.fault.kind == "drop":
            return self._close()
        if self.fault and self.fault.kind == "corrupt" and self.command in ("PUT", "POST"):
            body = flipped_upload(body)
        try:
            self._answer(path.strip("/"), query, body)
        except Refused as no:
            self._send(no.status, json.dumps({"error": no.message}).encode(), no.headers)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - the names that http.server calls

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, path: str, query: dict[str, str], body: bytes) -> None:
        top = path.split("/")[0]
        if top in ("cdn", "lfs"):
            if "Authorization" in self.headers:
                self.hub.cdn_tokens.append(path)
            return self._cdn(path) if top == "cdn" else self._lfs_put(path, body)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_ONLY, ONE_REPOSITORY, ""):
            raise Refused(401, "", "Invalid credentials in Authorization header")
        if path == "api/whoami-v2":
            if not token:
                raise Refused(401, "", "Invalid username or password.")
            role = {TOKEN: "write", READ_ONLY: "read"}.get(token, "fineGrained")
            return self._json({"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": role}}})
        if path == "api/validate-yaml":
            named = re.search(r"^base_model: (.*)$", json.loads(body)["content"], re.M)
            if named and not re.fullmatch(r"[\w.-]+/[\w.-]+", named[1]):
                said = f'"base_model" with value "{named[1]}" is not valid. Use a model id from https://hf.co/models.'
                return self._json({"errors": [{"message": said}], "warnings": []}, status=400)
            return self._json({"errors": [], "warnings": []})
        if path == "api/repos/create":
            return self._create(token, json.loads(body))
        if path.startswith("api/buckets/"):
            if not token or (self.command == "POST" and token != TOKEN and not path.endswith("paths-info")):
                raise Refused(403, "", "You need write access to this bucket")
            steps = path.split("/")[2:]
            exists = len(steps) == 2 and self.command == "POST" and "/".join(steps) in self.hub.buckets.found
            answer = self.hub.buckets.answer(self.hub.url, self.command, steps, query, body)
            return self._json(answer, status=409 if exists else 200)  # the client reads the URL from a 409 too
        if path.startswith("buckets/"):
            return self._send(200, b"", self.hub.buckets.resolve(self.hub.url, path.split("/")[1:]))
        if path.startswith("api/jobs/"):
            return self._jobs(token, path.split("/")[2:], body)
        api = path.startswith("api/")
        steps = path.removeprefix("api/").split("/")
        kind = steps.pop(0) if steps[0] in KINDS else "models"
        name = "/".join(steps[:2]).removesuffix(".git")
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not token):
            raise Refused(401 if not token else 404, "RepoNotFound", "Repository not found")
        writes = steps[2:3] in (
            ["commit"],
            ["preupload"],
            ["info"],
            ["xet-write-token"],
            ["super-squash"],
            ["settings"],
        )
        may_write = token == TOKEN or (token == ONE_REPOSITORY and name == f"{USER}/seal")
        if writes and not may_write:
            raise Refused(403, "", "You need write access to this repository")
        if not api:
            return self._lfs_batch(kind, name, repo, json.loads(body)) if writes else self._resolve(repo, steps)
        self._api(repo, name, steps[2:] or ["revision"], query, body)

    def _api(self, repo: Repo, name: str, steps: list[str], query: dict[str, str], body: bytes) -> None:
        verb, rest = steps[0], steps[1:]
        if verb == "commit":
            made = repo.commit([json.loads(line) for line in body.splitlines() if line.strip()], self._xet())
            return self._json(
                {"commitOid": made.sha, "commitUrl": f"{self.hub.url}/{name}/commit/{made.sha}", "pullRequestUrl": None}
            )
        if verb == "super-squash":
            repo.squash(json.loads(body)["message"])
            return self._json({})
        if verb == "settings":
            asked = json.loads(body)
            repo.gated = asked.get("gated", repo.gated)
            repo.private = asked["visibility"] == "private" if "visibility" in asked else repo.private
            return self._json({})
        if verb == "preupload":
            return self._json({"files": [_upload_mode(repo, f) for f in json.loads(body)["files"]]})
        if verb in ("xet-write-token", "xet-read-token"):
            cas = {"casUrl": f"local://{self.hub.xet}", "accessToken": "xet", "exp": 4102444800}
            heads = {
                "X-Xet-Cas-Url": cas["casUrl"],
                "X-Xet-Access-Token": "xet",
                "X-Xet-Token-Expiration": "4102444800",
            }
            return self._json(cas, heads)
        if verb == "commits":
            rest = {"message": "", "authors": [], "date": "2026-01-01T00:00:00Z"}
            return self._json([{"id": c.sha, "title": c.title, **rest} for c in reversed(repo.commits)])
        commit = repo.at(rest[0] if rest else "main")
        if verb == "revision":
            siblings = [{"rfilename": p, "size": b.size, "blobId": b.oid} for p, b in commit.files.items()]
            return self._json(
                {
                    "id": name,
                    "sha": commit.sha,
                    "private": repo.private,
                    "gated": repo.gated,
                    "siblings": siblings,
                    "tags": [],
                }
            )
        known = self._xet()
        entries = [entry(p, b, known) for p, b in sorted(commit.files.items())]
        if verb == "tree":
            return self._page(tree(entries, "/".join(rest[1:]), query.get("recursive") == "true"), query)
        wanted = parse_qs(body.decode()).get("paths", [])  # paths-info
        self._json([e for e in entries if e["path"] in wanted])

    def _xet(self) -> dict[str, str]:
        return xet_hashes(self.hub.xet) if self.hub.xet else {}

    def _page(self, entries: list[dict], query: dict[str, str], size: int = 50) -> None:
        start = int(query.get("cursor", 0))
        headers = {}
        if start + size < len(entries):
            parts = urlsplit(self.path)
            recursive = query.get("recursive", "false")
            headers["Link"] = f'<{self.hub.url}{parts.path}?recursive={recursive}&cursor={start + size}>; rel="next"'
        self._json(entries[start : start + size], headers)

    def _create(self, token: str, asked: dict[str, Any]) -> None:
        if token != TOKEN:
            raise Refused(403, "", "You need write access to create a repository")
        kind = f"{asked.get('type', 'model')}s"
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        status = 409 if (kind, name) in self.hub.repos else 200
        if status == 200:
            self.hub.add(kind, name, {".gitattributes": b""}).private = asked.get("visibility") == "private"
        self._json(
            {"url": f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{name}", "name": name}, status=status
        )

    def _lfs_batch(self, kind: str, name: str, repo: Repo, asked: dict[str, Any]) -> None:
        transfer = "xet" if self.hub.xet and "xet" in asked["transfers"] else "multipart"
        found = []
        for wanted in asked["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            href = f"{self.hub.cdn}/lfs/{kind}/{name}/{oid}"
            upload: dict[str, Any] = {"href": href, "header": {}}
            if size > CHUNK:
                numbers = range(1, -(-size // CHUNK) + 1)
                upload["header"] = {"chunk_size": str(CHUNK)} | {str(n): f"{href}/{n}" for n in numbers}
            there = oid in repo.lfs and transfer != "xet"
            found.append({"oid": oid, "size": size} | ({} if there else {"actions": {"upload": upload}}))
        self._json({"transfer": transfer, "objects": found})

    def _lfs_put(self, path: str, body: bytes) -> None:
        _, kind, owner, name, oid, *part = path.split("/")
        repo = self.hub.repos[kind, f"{owner}/{name}"]
        if part:
            repo.parts.setdefault(oid, {})[int(part[0])] = body
            return self._send(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        content = body
        if self.command == "POST":  # the end of a multipart upload
            parts = repo.parts.pop(oid)
            content = b"".join(parts[n] for n in sorted(parts))
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(422, "", "the content is not what its hash says")
        repo.lfs[oid] = content
        self._json({})

    def _resolve(self, repo: Repo, steps: list[str]) -> None:  # owner/name/resolve/REVISION/path
        commit, path = repo.at(steps[3]), "/".join(steps[4:])
        blob = commit.files.get(path)
        head = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if blob is None:
            raise Refused(404, "EntryNotFound", f"{path} is not there", **head)
        if blob.sha256 is None:
            return self._content(blob.content, head | {"ETag": f'"{blob.oid}"'})
        head |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        known = self._xet()
        if blob.sha256 in known:
            kind = next(kind for (kind, _), r in self.hub.repos.items() if r is repo)
            auth = f"{self.hub.url}/api/{kind}/{steps[0]}/{steps[1]}/xet-read-token/{commit.sha}"
            head |= {"X-Xet-Hash": known[blob.sha256], "Link": f'<{auth}>; rel="xet-auth"'}
        self._send(302, b"", head | {"Location": f"{self.hub.cdn}/cdn/{quote(blob.sha256)}"})

    def _cdn(self, path: str) -> None:
        oid = path.split("/")[1]
        content = next(r.lfs[oid] for r in self.hub.repos.values() if oid in r.lfs)
        self._content(content, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        wanted = self.headers.get("Range")
        if not wanted:
            return self._send(200, content, headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(content)), len(content) - 1)
        if start >= len(content):
            raise Refused(416, "", "past the end")
        self._send(206, content[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"})

    def _jobs(self, token: str, steps: list[str], body: bytes) -> None:
        if not token:
            raise Refused(401, "", "Invalid username or password.")
        if steps == ["hardware"]:
            return self._json(list_hardware())
        jobs, number = self.hub.jobs, steps[1] if len(steps) > 1 else ""
        if number and jobs.jobs.get(number, {}).get("namespace") != steps[0]:
            raise Refused(404, "", "no such job")
        if len(steps) == 1 and self.command == "GET":
            asked = parse_qs(urlsplit(self.path).query)
            return self._json(jobs.listed(steps[0], asked.get("label", []), asked.get("stage", [])))
        if len(steps) == 1:
            return self._json(jobs.submit(steps[0], json.loads(body)))
        if steps[2:] == ["duplicate"]:
            return self._json(jobs.duplicate(number))
        if steps[2:] == ["cancel"]:
            jobs.cancel(number)
        if steps[2:] != ["logs"]:
            return self._json(jobs.shown(number))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for line in jobs.lines(number):
            event = json.dumps({"timestamp": "2026-01-01T00:00:00Z", "data": line})
            self.wfile.write(f"data: {event}\n\n".encode())
            self.wfile.flush()
        self.close_connection = True

    def _json(self, value: object, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        kind = self.fault.kind if self.fault else None
        if kind == "lost":
            return self._close()
        if kind == "corrupt" and self.command == "GET" and content:
            content = flipped(content)
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if kind == "truncate" else content)
        if kind == "truncate":
            self._close()

    def _close(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()


def _upload_mode(repo: Repo, file: dict[str, Any]) -> dict[str, Any]:
    there = repo.commits[-1].files.get(file["path"])
    mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
    oid = (there.sha256 or there.oid) if there else None
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def flipped_upload(body: bytes) -> bytes:
    """An upload that arrives damaged: a bit of a file's bytes, or of a regular file inside a commit."""
    import base64

    if not body.startswith(b'{"key"'):
        return flipped(body)
    lines = [json.loads(line) for line in body.splitlines()]
    for line in lines:
        if line["key"] == "file" and line["value"]["path"].endswith("trainer_state.json"):
            line["value"]["content"] = base64.b64encode(flipped(base64.b64decode(line["value"]["content"]))).decode()
    return b"\n".join(json.dumps(line).encode() for line in lines)
