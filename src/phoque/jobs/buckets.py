"""A private bucket: whether it exists and is private, what a folder of it holds, and errors of writing to it."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from phoque.errors import UsageError
from phoque.hub.client import Hub


def check_private(hub: Hub, bucket: str, *, why: str, fix: str) -> bool:
    """Whether the bucket exists. Raises UsageError if it is public; `why` and `fix` complete the message."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = hub.retry(bucket, lambda: hub.api.bucket_info(bucket))
    except HfHubHTTPError as error:
        if error.response.status_code == 404:
            return False
        raise
    if not info.private:
        raise UsageError(
            what=f"The bucket {bucket} is public.",
            why=why,
            fix=f"Make it private in its settings on the Hub, or {fix}.",
        )
    return True


def list_folder(hub: Hub, bucket: str, folder: str) -> list[Any]:
    """The files in a folder of a bucket; none if there is no such bucket."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        listed = hub.retry(bucket, lambda: list(hub.api.list_bucket_tree(bucket, prefix=f"{folder}/", recursive=True)))
    except HfHubHTTPError as error:
        if error.response.status_code == 404:
            return []
        raise
    return [item for item in listed if item.type == "file"]


def delete_folder(hub: Hub, bucket: str, folder: str) -> None:
    """Delete a folder of a bucket."""
    if paths := [item.path for item in list_folder(hub, bucket, folder)]:
        hub.retry(bucket, lambda: hub.api.batch_bucket_files(bucket, delete=paths))


@contextmanager
def writing(bucket: str, *, why: str, fix: str) -> Generator[None]:
    """Raise UsageError if the token may not write to the bucket; `why` and `fix` complete the message."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise UsageError(what=f"The token may not write to the bucket {bucket}.", why=why, fix=fix) from error
