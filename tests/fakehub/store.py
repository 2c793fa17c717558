"""Repositories as the Hub keeps them: commits of whole file lists, and blobs by their content."""

import base64
import hashlib
import json
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LFS = (".safetensors", ".pt", ".pth", ".bin", ".parquet", ".gguf", ".onnx", ".whl")


class Refused(Exception):
    """An answer that is no success: a status and the headers that the client reads its reason from."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        super().__init__(f"{status} {code} {message}")
        self.status, self.message = status, message or code
        self.headers = {"X-Error-Code": code, "X-Error-Message": self.message, **headers}


@dataclass
class Blob:
    """A file of a commit: its bytes (None if they lie in the xet store), or what LFS says about them."""

    content: bytes | None
    size: int
    oid: str
    sha256: str | None = None  # of an LFS file


def regular(content: bytes) -> Blob:
    return Blob(content, len(content), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS) or size > 10_000_000


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, Blob]
    at: float = field(default_factory=time.time)


class Repo:
    """A linear history; the newest commit is last."""

    def __init__(self, private: bool, files: dict[str, bytes] | None = None) -> None:
        self.private = private
        self.gated: str | bool = False
        self.commits: list[Commit] = []
        self.lfs: dict[str, bytes | None] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self._lock = threading.Lock()
        self.record("initial commit", {path: self.blob(path, content) for path, content in (files or {}).items()})

    def blob(self, path: str, content: bytes) -> Blob:
        if not is_lfs(path, len(content)):
            return regular(content)
        oid = hashlib.sha256(content).hexdigest()
        self.lfs[oid] = content
        return self.pointer(oid, len(content))

    def pointer(self, sha256: str, size: int) -> Blob:
        return Blob(self.lfs.get(sha256), size, hashlib.sha1(sha256.encode()).hexdigest(), sha256)

    def record(self, title: str, files: dict[str, Blob]) -> Commit:
        listing = json.dumps([sorted((p, b.oid) for p, b in files.items()), len(self.commits), title])
        self.commits.append(Commit(hashlib.sha1(listing.encode()).hexdigest(), title, files))
        return self.commits[-1]

    def squash(self, title: str) -> None:
        """One commit with the present files, instead of the history."""
        files = self.commits[-1].files
        self.record(title, files)
        self.commits = self.commits[-1:]

    def at(self, revision: str) -> Commit:
        if revision in ("main", "refs/heads/main"):
            return self.commits[-1]
        for commit in self.commits:
            if commit.sha == revision:
                return commit
        raise Refused(404, "RevisionNotFound")

    def commit(self, lines: list[dict], xet: dict[str, str]) -> Commit:
        """Apply the NDJSON of a commit, all of it or nothing; `xet` knows the files that hf_xet has stored."""
        with self._lock:
            head = self.commits[-1]
            files, title = dict(head.files), ""
            for line in lines:
                key, value = line["key"], line["value"]
                if key == "header":
                    title = value["summary"]
                    if value.get("parentCommit") not in (None, head.sha):
                        raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
                elif key == "file":
                    files[value["path"]] = regular(base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    if value["oid"] not in self.lfs and value["oid"] not in xet:
                        raise Refused(400, "", f"LFS pointer pointed to a file that does not exist: {value['path']}")
                    files[value["path"]] = self.pointer(value["oid"], value["size"])
                else:
                    prefix = value["path"].rstrip("/")
                    gone = [p for p in files if p == prefix or (key == "deletedFolder" and p.startswith(f"{prefix}/"))]
                    if not gone:
                        raise Refused(404, "EntryNotFound", f"{prefix} is not there")
                    for path in gone:
                        del files[path]
            return self.record(title, files)


def entry(path: str, blob: Blob, xet: dict[str, str]) -> dict:
    """A file as the tree and paths-info list it."""
    shown: dict = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
    if blob.sha256:
        shown["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
        if blob.sha256 in xet:
            shown["xetHash"] = xet[blob.sha256]
    return shown


def tree(files: list[dict], folder: str, recursive: bool) -> list[dict]:
    """The files and folders below a folder."""
    prefix = f"{folder}/" if folder else ""
    inside = [e for e in files if e["path"].startswith(prefix)]
    if not inside and folder:
        raise Refused(404, "EntryNotFound", f"{folder} is not there")
    below = [(e, e["path"][len(prefix) :].split("/")) for e in inside]
    depth = max((len(parts) for _, parts in below), default=1) if recursive else 2
    folders = {prefix + "/".join(p[:n]) for _, p in below for n in range(1, min(len(p), depth))}
    shown = [e for e, parts in below if recursive or len(parts) == 1]
    return [
        {"type": "directory", "path": f, "oid": hashlib.sha1(f.encode()).hexdigest()} for f in sorted(folders)
    ] + shown


def xet_hashes(store: Path) -> dict[str, str]:
    """sha256 -> xet hash of every file in hf_xet's local store that was stored with its sha256."""
    return {sha256: name for name, _, sha256 in xet_files(store) if sha256}


def xet_files(store: Path) -> Iterator[tuple[str, int, str | None]]:
    """(xet hash, size, sha256) of every file in hf_xet's local store, read from its metadata shards."""
    for shard in store.rglob("*.mdb"):
        data, at = shard.read_bytes(), 48
        while at + 48 <= len(data) and data[at : at + 32] != b"\xff" * 32:
            name, (flags, entries) = data[at : at + 32], struct.unpack_from("<II", data, at + 32)
            # an entry is a segment: 32 bytes of hash, flags, and its size
            size = sum(struct.unpack_from("<I", data, at + 48 + 48 * entry + 36)[0] for entry in range(entries))
            at += 48 + 48 * entries * (2 if flags & 0x80000000 else 1)
            sha256 = None
            if flags & 0x40000000:
                sha256 = words(data[at : at + 32])
                at += 48
            yield words(name), size, sha256


def words(raw: bytes) -> str:
    return "".join(f"{n:016x}" for n in struct.unpack("<4Q", raw))
