"""--run-dir of a Job: a folder of a private bucket, mounted for writing, so that a Job without a token keeps its run.

A Job cannot mount a folder that does not exist, so a file that says what the folder is goes there first.
"""

import re
from dataclasses import dataclass
from typing import Any

from phoque.errors import UsageError
from phoque.hub.client import Hub
from phoque.hub.folder_store import MARK, MARK_TEXT
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
        """For a dry run: the folder and whether its bucket exists. Raises UsageError if the bucket is public."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            info = hub.retry(self.bucket, lambda: hub.api.bucket_info(self.bucket))
        except HfHubHTTPError as error:
            if error.response.status_code == 404:
                return f"{self.uri}, will be made, private"
            raise
        if not info.private:
            raise UsageError(
                what=f"The bucket {self.bucket} is public.",
                why="Anyone could load what this run makes.",
                fix="Make it private in its settings on the Hub, or choose another bucket.",
            )
        if (present := self._list(hub)) and not any(path.endswith(f"/{MARK}") for path in present):
            raise UsageError(
                what=f"{self.uri} is not the folder of a run.",
                why=f"It has {present[0]} and no {MARK}: a run would delete and replace files there.",
                fix="Choose a new or empty folder for --run-dir.",
            )
        return f"{self.uri}, private"

    def _list(self, hub: Hub) -> list[str]:
        list_tree = lambda: list(hub.api.list_bucket_tree(self.bucket, prefix=f"{self.folder}/", recursive=True))
        return [item.path for item in hub.retry(self.bucket, list_tree) if item.type == "file"]

    def create(self, hub: Hub) -> None:
        """Create the bucket and the folder if they do not exist. Raises UsageError if the token may not."""
        from huggingface_hub.errors import HfHubHTTPError

        api = hub.api
        try:
            hub.retry(self.bucket, lambda: api.create_bucket(self.bucket, private=True, exist_ok=True))
            self.describe(hub)
            mark = [(MARK_TEXT.encode(), f"{self.folder}/{MARK}")]
            if not self._list(hub):
                hub.retry(self.bucket, lambda: api.batch_bucket_files(self.bucket, add=mark))
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            raise UsageError(
                what=f"The token may not write to the bucket {self.bucket}.",
                why="The Job writes its checkpoints and the adapter there.",
                fix="Use a token that may write to it, or choose another --run-dir.",
            ) from error


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
