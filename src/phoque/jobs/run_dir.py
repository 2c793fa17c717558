"""--run-dir of a Job: a folder of a private bucket, mounted for writing, so that a Job without a token keeps its run.

A Job cannot mount a folder that does not exist, so a file that says what the folder is goes there first.
"""

import re
from dataclasses import dataclass
from typing import Any

from phoque.errors import UsageError
from phoque.hub.client import Hub
from phoque.hub.folder_store import MARK, MARK_TEXT
from phoque.jobs.buckets import check_private, list_folder, writing
from phoque.jobs.inputs import BUCKET

MOUNT = "/run-dir"
_URI = re.compile(r"hf://buckets/(?P<bucket>[\w.-]+/[\w.-]+)(?:/(?P<folder>.+?))?/?")


@dataclass(frozen=True)
class BucketFolder:
    """A folder of a bucket, for the output of a run."""

    bucket: str
    folder: str

    @property
    def uri(self) -> str:
        """The folder as the Hub writes it."""
        return f"hf://buckets/{self.bucket}/{self.folder}"

    def volume(self) -> Any:
        """The mount, for reading and writing."""
        from huggingface_hub import Volume

        return Volume(type="bucket", source=self.bucket, mount_path=MOUNT, path=self.folder, read_only=False)

    def describe(self, hub: Hub) -> str:
        """For a dry run: the folder and whether its bucket exists. Raises UsageError if it cannot keep a run."""
        return f"{self.uri}, private" if self._check(hub)[0] else f"{self.uri}, will be made, private"

    def create(self, hub: Hub) -> None:
        """Create the bucket and the folder if they do not exist. Raises UsageError if the token may not."""
        api, mark = hub.api, [(MARK_TEXT.encode(), f"{self.folder}/{MARK}")]
        fix = "Use a token that may write to it, or choose another --run-dir."
        with writing(self.bucket, why="The Job writes its checkpoints and the adapter there.", fix=fix):
            hub.retry(self.bucket, lambda: api.create_bucket(self.bucket, private=True, exist_ok=True))
            _, files = self._check(hub)
            if not files:
                hub.retry(self.bucket, lambda: api.batch_bucket_files(self.bucket, add=mark))

    def _check(self, hub: Hub) -> tuple[bool, list[str]]:
        """Whether the bucket exists, and the folder's files. Raises UsageError if it is public or holds other files."""
        exists = check_private(
            hub, self.bucket, why="Anyone could load what this run makes.", fix="choose another bucket"
        )
        files = [item.path for item in list_folder(hub, self.bucket, self.folder)] if exists else []
        if files and not any(path.endswith(f"/{MARK}") for path in files):
            raise UsageError(
                what=f"{self.uri} is not the folder of a run.",
                why=f"It has {files[0]} and no {MARK}: a run would delete and replace files there.",
                fix="Choose a new or empty folder for --run-dir.",
            )
        return exists, files


def find_bucket_folder(run_dir: str) -> BucketFolder:
    """The bucket's folder that --run-dir of a Job names. Raises UsageError for another place."""
    match = _URI.fullmatch(run_dir)
    parts = (match["folder"] or "").split("/") if match else []
    if match and match["bucket"].endswith(f"/{BUCKET}"):
        raise UsageError(
            what=f"--run-dir {run_dir} is in the bucket of Jobs' inputs.",
            why="`phoque jobs clean` deletes there what no Job needs any more.",
            fix="Choose another bucket, such as hf://buckets/OWNER/runs/FOLDER.",
        )
    if match is None or not all(part not in ("", ".", "..") for part in parts):
        raise UsageError(
            what=f"--run-dir {run_dir} is not a folder of a bucket.",
            why="A Job cannot write to this machine, and a bucket holds several runs.",
            fix="Give hf://buckets/OWNER/NAME/FOLDER; the bucket is created private.",
        )
    return BucketFolder(match["bucket"], match["folder"])
