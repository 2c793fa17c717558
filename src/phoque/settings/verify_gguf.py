"""The settings of `phoque verify-gguf`."""

from pathlib import Path
from typing import ClassVar, Literal

from phoque.settings.fields import setting
from phoque.settings.job import REPO, HubSettings

GGUF_LEVELS = ("files", "graph", "llama.cpp", "node", "browser")


class VerifyGgufSettings(HubSettings):
    """The settings of one verification of GGUF files."""

    main_input: ClassVar = "local_dir"
    groups: ClassVar = {
        "Export": "repo_id revision local_dir dtype reference level install",
        "Data": "chats",
        "Chat page": "serve port",
        "Output": "report_md",
        "Hub": "hub_patience",
    }

    repo_id: str = setting("", "Verify the GGUF files of this Hub repository (owner/name).", pattern=rf"^$|{REPO}")
    revision: str | None = setting(None, "Use this branch, tag or commit of --repo-id.", env="PHOQUE_GGUF_REVISION")
    local_dir: Path | None = setting(None, "Verify the GGUF files in this folder, or this one file.")
    reference: str = setting(
        "",
        "Compare with the original model: a folder or Hub id. Without it, files are checked against their own chat "
        "template and against the most precise file only.",
    )
    dtype: list[str] = setting(
        [],
        "Verify the files of this precision, such as q4_k_m. Separate several with commas. Without it, verify all.",
        env="PHOQUE_GGUF_DTYPE",
        commas=True,
    )
    level: Literal["files", "graph", "llama.cpp", "node", "browser"] | None = setting(
        None, "Stop after this level. Without it, go as far as this machine can."
    )
    install: bool = setting(
        False, "Install llama.cpp, and the clients for Node and the browser, into phoque's cache without asking."
    )
    chats: str = setting(
        "seal", "Compare the tokens of these conversations: a Hub dataset, a file, a folder, or `seal` (bundled)."
    )
    report_md: Path | None = setting(None, "Also write the verdict to this file as Markdown, for a model card.")
    serve: bool = setting(
        False, "Open the smallest file in a chat page that runs it in the browser (wllama), instead of verifying it."
    )
    port: int = setting(8017, "Serve the chat page of --serve on this port; 0 picks a free one.", ge=0, le=65535)
