"""Every error a user can meet: what happened, why, what to do; and the exit codes."""

import errno

DONE = 0
FAILED = 1  # it ran and failed; also a verification that says no
USAGE = 2  # usage or configuration
RESUMABLE = 75  # stopped, and the same command goes on (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # Ctrl-C


class PhoqueError(Exception):
    """An error in three lines: what happened, why, and what to do about it; `code` is the exit code.

    - UsageError (2): a wrong flag, file, model or dataset. Nothing was changed.
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
    """The three lines for any exception; foreign types are told apart by name, so nothing heavy is imported here."""
    if isinstance(error, PhoqueError):
        return error
    if disk_full(error):
        return PhoqueError("The disk is full.", first_line(error), _MAKE_ROOM, FAILED)
    if isinstance(error, OSError) and error.errno in _OS_ERRORS:
        why, fix, code = _OS_ERRORS[error.errno]
        return PhoqueError(f"{error.strerror}: {error.filename or 'a file of this run'}", why, fix, code)
    if usage := getattr(error, "format_message", None):  # of the command line parser, which knows near misses
        return PhoqueError(usage(), "The command line is not one that phoque knows.", _HELP)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) and type(error).__name__ == "HfHubHTTPError":
        return PhoqueError("The Hub refuses this token.", first_line(error), _TOKEN)
    for kind in type(error).__mro__:
        if kind.__name__ in _FOREIGN:
            what, fix, code = _FOREIGN[kind.__name__]
            return PhoqueError(what, first_line(error), fix, code)
    return PhoqueError(
        f"phoque met an error it does not know: {type(error).__name__}",
        first_line(error),
        "Set PHOQUE_DEBUG=1 to see the traceback, and report it with that.",
        FAILED,
    )


def disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of room; torch and safetensors say so only in their texts."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    return any(said in text for said in _NO_ROOM)


def first_line(error: BaseException) -> str:
    """What an error says, in one line; some say nothing but their name."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


_HELP = "See `phoque --help` and `phoque COMMAND --help`."

_NO_ROOM = ("No space left on device", "PytorchStreamWriter failed writing", "inline_container.cc")
_TOKEN = "Use a token with write access to that repository: set HF_TOKEN, or run `hf auth login`."
_MAKE_ROOM = "Free some space or choose another --output-dir, then run the same command."
_OWN_FOLDER = "Choose a folder that is yours, or change its permissions."

_OS_ERRORS = {
    errno.EACCES: ("You may not read or write there.", _OWN_FOLDER, USAGE),
    errno.EPERM: ("You may not read or write there.", _OWN_FOLDER, USAGE),
    errno.EROFS: ("That file system is read-only.", "Choose an --output-dir on a disk that can be written.", USAGE),
    errno.ENOENT: ("There is no such place.", "Check the path.", USAGE),
    errno.ENOTDIR: ("A file is in the way of a folder.", "Choose another --output-dir.", USAGE),
    errno.EEXIST: ("A file is in the way of a folder.", "Choose another --output-dir.", USAGE),
}

_FOREIGN = {
    "KeyboardInterrupt": ("Interrupted.", "Run the same command again.", INTERRUPTED),
    "GatedRepoError": (
        "The repository is gated and this token has no access.",
        "Accept its terms on its Hub page, then run the same command.",
        USAGE,
    ),
    "RepositoryNotFoundError": (
        "No such repository on the Hub, or it is private and the token may not see it.",
        "Check the name, and that HF_TOKEN is set (or run `hf auth login`).",
        USAGE,
    ),
    "EmptyDatasetError": (
        "The dataset repository holds no data files.",
        "Check --dataset and --dataset-revision.",
        USAGE,
    ),
    "RevisionNotFoundError": ("No such revision on the Hub.", "Check --revision.", USAGE),
    "LocalEntryNotFoundError": (
        "The Hub cannot be reached and the files are not in the local cache.",
        "Check the network, or name a local folder.",
        FAILED,
    ),
    "OfflineModeIsEnabled": (
        "The Hub was needed, but HF_HUB_OFFLINE is set.",
        "Unset HF_HUB_OFFLINE, or name local files.",
        USAGE,
    ),
    "HfHubHTTPError": ("The Hub refused a request.", "Check the token and the name, or try again later.", FAILED),
    "ConnectionError": ("The network failed.", "Check the connection and run the same command.", FAILED),
    "ConnectError": ("The network failed.", "Check the connection and run the same command.", FAILED),
    "MemoryError": ("Out of host memory.", "Lower --batch-size or --max-length, or use a larger machine.", FAILED),
}
