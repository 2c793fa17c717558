"""The error that users see (what happened, why, what to do), the exit codes, and the conversion of other errors."""

import difflib
import errno
from collections.abc import Iterable

LOG_IN = "Set HF_TOKEN, or run `hf auth login`."

FAILED = 1  # the command ran and failed, or a verification did not pass
USAGE = 2  # wrong usage or configuration
RESUMABLE = 75  # stopped early; the same command resumes it (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # Ctrl-C


class PhoqueError(Exception):
    """An error in three lines: what happened, why, and what to do about it; `code` is the exit code.

    - UsageError (2): a wrong flag, file, model or dataset.
      - PublicRepoError: a repository is public and --public was not given.
    - RunError (1): the command ran and failed; also a verification that says no.
    - Resumable (75, or 130 after Ctrl-C): the run stopped, everything is saved, and the same command continues it.
    """

    code = FAILED

    def __init__(self, *, what: str, why: str, fix: str, code: int | None = None) -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix
        if code is not None:
            self.code = code


class UsageError(PhoqueError):
    """The command cannot run as it was given: exit code 2."""

    code = USAGE


class PublicRepoError(UsageError):
    """A repository that anyone can read, where --public was not given."""

    def __init__(self, repo: str) -> None:
        super().__init__(
            what=f"{repo} is public.",
            why="Anyone could load what this run makes.",
            fix="Make it private in its settings on the Hub, or pass --public if that is intended.",
        )


class RunError(PhoqueError):
    """The command ran and failed: exit code 1."""


class Resumable(PhoqueError):
    """The run stopped before its end and saved all that a resume needs: exit code 75, or 130 after Ctrl-C."""

    code = RESUMABLE


class IntegrityError(Exception):
    """A file that was read back is not the file that was sent; transferring it again may help."""


class Superseded(Exception):
    """A newer checkpoint is waiting: this push is no longer worth retrying."""


def to_phoque_error(error: BaseException) -> PhoqueError:
    """Convert any exception to a PhoqueError. Types of other libraries are matched by name, to avoid importing them."""
    if isinstance(error, PhoqueError):
        return error
    if disk_full(error):
        return RunError(what="The disk is full.", why=first_line(error), fix=_MAKE_ROOM)
    if isinstance(error, OSError) and error.errno in _OS_ERRORS:
        why, fix, code = _OS_ERRORS[error.errno]
        if ".cache" in str(error.filename or ""):
            fix = "Set XDG_CACHE_HOME, and HF_HOME for what is downloaded, to folders that you can write."
        return PhoqueError(
            what=f"{error.strerror}: {error.filename or 'a file of this run'}", why=why, fix=fix, code=code
        )
    if usage := getattr(error, "format_message", None):  # from Click; its message suggests similar names
        return UsageError(what=usage(), why="The command line is not valid.", fix=_advise_on_command_line(error))
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) and type(error).__name__ == "HfHubHTTPError":
        return UsageError(what="The Hub rejected the token.", why=_describe_request(error), fix=_TOKEN)
    for kind in type(error).__mro__:
        if kind.__name__ in _FOREIGN:
            what, fix, code = _FOREIGN[kind.__name__]
            return PhoqueError(what=what, why=_describe_request(error), fix=fix, code=code)
    return RunError(
        what=f"Unexpected error: {type(error).__name__}",
        why=first_line(error),
        fix="Set PHOQUE_DEBUG=1 to see the traceback, and report the error with it.",
    )


def disk_full(error: BaseException) -> bool:
    """Whether a write failed because the disk is full; torch and safetensors only say so in their messages."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    return any(message in text for message in _NO_ROOM)


def suggest(name: str, known: Iterable[str], otherwise: str) -> str:
    """`Did you mean ...?` with the known name that is nearest, or `otherwise` if none is near."""
    near = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"Did you mean {near[0]}?" if near else otherwise


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 300 characters; an empty message gives the type's name."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _describe_request(error: BaseException) -> str:
    """The first line of an error, and what was asked for if the error came from a request: `GET <address>`."""
    request = getattr(getattr(error, "response", None), "request", None)
    if request is None:
        try:
            request = getattr(error, "request", None)  # httpx raises RuntimeError if the error has none
        except RuntimeError:
            request = None
    url = str(getattr(request, "url", "")).partition("?")[0]
    return (
        f"{first_line(error).rstrip('.')}: {request.method} {url}" if request is not None and url else first_line(error)
    )


def _advise_on_command_line(error: BaseException) -> str:
    """Where to read on, for an error of Click."""
    command = getattr(getattr(error, "ctx", None), "command_path", "phoque")
    return f"See `{command} --help`."


_NO_ROOM = ("No space left on device", "PytorchStreamWriter failed writing", "inline_container.cc")
_TOKEN = "Use a token with write access to that repository: set HF_TOKEN, or run `hf auth login`."
_MAKE_ROOM = "Free some space or choose another --output-dir, then run the same command."
_OWN_FOLDER = "Choose a folder that you can read and write, or change its permissions."

_OS_ERRORS = {
    errno.EACCES: ("You have no permission to read or write it.", _OWN_FOLDER, USAGE),
    errno.EPERM: ("You have no permission to read or write it.", _OWN_FOLDER, USAGE),
    errno.EROFS: ("The file system is read-only.", "Choose an --output-dir on a writable disk.", USAGE),
    errno.ENOENT: ("The file or folder does not exist.", "Check the path.", USAGE),
    errno.ENOTDIR: ("A file exists where a folder is needed.", "Choose another --output-dir.", USAGE),
    errno.ENAMETOOLONG: ("The name is longer than the file system allows.", "Choose a shorter name.", USAGE),
    errno.EEXIST: ("A file exists where a folder is needed.", "Choose another --output-dir.", USAGE),
}

_FOREIGN = {
    "KeyboardInterrupt": ("Interrupted.", "Run the same command again.", INTERRUPTED),
    "GatedRepoError": (
        "The repository is gated, and the token has no access to it.",
        "Accept the terms on its Hub page, then run the same command again.",
        USAGE,
    ),
    "RepositoryNotFoundError": (
        "No such repository on the Hub, or it is private and the token may not see it.",
        "Check the name, and set HF_TOKEN or run `hf auth login`.",
        USAGE,
    ),
    "RevisionNotFoundError": ("The revision does not exist on the Hub.", "Check --revision.", USAGE),
    "LocalEntryNotFoundError": (
        "The Hub cannot be reached, and the files are not in the local cache.",
        "Check the network connection, or use a local folder.",
        FAILED,
    ),
    "OfflineModeIsEnabled": (
        "The command needs the Hub, but HF_HUB_OFFLINE is set.",
        "Unset HF_HUB_OFFLINE, or use local files.",
        USAGE,
    ),
    "HfHubHTTPError": ("The Hub rejected a request.", "Check the token and the name, or try again later.", FAILED),
    "ConnectionError": ("The network connection failed.", "Check it, then run the same command again.", FAILED),
    "ConnectError": ("The network connection failed.", "Check it, then run the same command again.", FAILED),
    "OutOfMemoryError": (  # torch's
        "The GPU's memory is full.",
        "Use --quantization nf4, free the GPU of other programs, or use one with more memory.",
        FAILED,
    ),
    "MemoryError": (
        "The machine has run out of memory (RAM).",
        "Lower --batch-size or --max-length, or use a larger machine.",
        FAILED,
    ),
}
