"""The settings of `phoque verify-onnx`."""

from pathlib import Path
from typing import Literal

from phoque.settings.export_onnx import PRECISIONS
from phoque.settings.fields import CommandSettings, setting
from phoque.settings.job import REPO

LEVELS = ("files", "graph", "ort", "node", "browser")


class VerifySettings(CommandSettings):
    """What one verification is asked to do."""

    repo_id: str = setting("", "export on the Hub: owner/name", pattern=rf"^$|{REPO}")
    revision: str | None = setting(None, "branch, tag or commit of it", env="PHOQUE_ONNX_REVISION")
    local_dir: Path | None = setting(None, "export in a folder")
    reference: str = setting("", "the model it came from, to compare with: folder, Hub id; default the best precision")
    dtype: list[str] = setting(
        [], f"precision, repeatable: {', '.join(PRECISIONS)}; default all that are there", env="PHOQUE_ONNX_DTYPE"
    )
    level: Literal["files", "graph", "ort", "node", "browser"] | None = setting(
        None, "how far to go; default as far as this machine can"
    )
    webgpu: bool = setting(False, "in the browser compare WebGPU's logits with wasm's, too")
    install: bool = setting(False, "install the Transformers.js client into phoque's cache without asking")
    report_md: Path | None = setting(None, "write the verdict as Markdown, for a model card")
    serve: bool = setting(False, "open the model in a chat page on this machine")
    port: int = setting(8017, "of that page; 0 takes a free one", ge=0, le=65535)
    hub_patience: int = setting(300, "seconds for which a request that the Hub fails is tried again", ge=0)
