"""Buckets as the Hub has them: a flat list of files, whose contents lie in hf_xet's own local store."""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakehub.store import Refused, xet_files

NOW = "2026-01-01T00:00:00.000Z"


@dataclass
class Bucket:
    """`files` maps a path to its xet hash."""

    private: bool
    files: dict[str, str] = field(default_factory=dict)


class Buckets:
    """All buckets of a Hub."""

    def __init__(self) -> None:
        self.found: dict[str, Bucket] = {}
        self._store: tempfile.TemporaryDirectory | None = None

    def empty(self) -> None:
        self.found.clear()

    @property
    def store(self) -> Path:
        """The folder of hf_xet's local store."""
        self._store = self._store or tempfile.TemporaryDirectory(prefix="phoque-buckets-")
        return Path(self._store.name)

    def answer(self, hub_url: str, method: str, steps: list[str], query: dict[str, str], body: bytes) -> Any:
        """What the Hub answers to a request below /api/buckets/, as JSON; a pair with headers for a token."""
        namespace, name, *rest = steps
        bucket_id = f"{namespace}/{name}"
        bucket = self.found.get(bucket_id)
        if method == "POST" and not rest:
            if bucket is None:
                self.found[bucket_id] = Bucket(json.loads(body or b"{}").get("visibility") == "private")
            return {"url": f"{hub_url}/buckets/{bucket_id}", "id": bucket_id}
        if bucket is None:
            raise Refused(404, "RepoNotFound", "Bucket not found")
        if method == "GET" and not rest:
            total = len(bucket.files)
            return {"id": bucket_id, "private": bucket.private, "createdAt": NOW, "size": 0, "totalFiles": total}
        if rest[0].startswith("xet-"):
            return {"casUrl": f"local://{self.store}", "accessToken": "xet", "exp": 4102444800}
        if rest[0] == "batch":
            return self._batch(bucket, [json.loads(line) for line in body.splitlines() if line.strip()])
        if rest[0] == "paths-info":
            wanted = [path for path in json.loads(body)["paths"] if path in bucket.files]
            return self._list(bucket, wanted)
        if rest[0] == "tree":
            prefix = "/".join(rest[1:])
            return self._list(bucket, [path for path in sorted(bucket.files) if path.startswith(prefix)])
        raise Refused(404, "", f"no such bucket request: {method} {'/'.join(steps)}")

    def resolve(self, hub_url: str, steps: list[str]) -> dict[str, str]:
        """The headers that say where a file's content is, for owner/name/resolve/path."""
        bucket_id, path = "/".join(steps[:2]), "/".join(steps[3:])
        bucket = self.found.get(bucket_id)
        if bucket is None or path not in bucket.files:
            raise Refused(404, "EntryNotFound", f"{path} is not there")
        (file,) = self._list(bucket, [path])
        auth = f"{hub_url}/api/buckets/{bucket_id}/xet-read-token"
        return {
            "X-Xet-Hash": file["xetHash"],
            "Link": f'<{auth}>; rel="xet-auth"',
            "X-Linked-Size": str(file["size"]),
        }

    def _batch(self, bucket: Bucket, lines: list[dict[str, Any]]) -> dict[str, Any]:
        failed = []
        for line in lines:
            if line["type"] == "addFile":
                bucket.files[line["path"]] = line["xetHash"]
            elif line["type"] == "deleteFile" and bucket.files.pop(line["path"], None) is None:
                failed.append({"path": line["path"], "error": "not found"})
        return {"success": not failed, "failed": failed}

    def _list(self, bucket: Bucket, paths: list[str]) -> list[dict[str, Any]]:
        sizes = {name: size for name, size, _ in xet_files(self.store)}
        hashes = {path: bucket.files[path] for path in paths}
        times = {"mtime": NOW, "uploadedAt": NOW}
        return [
            {"type": "file", "path": path, "xetHash": name, "size": sizes[name], **times}
            for path, name in hashes.items()
        ]
