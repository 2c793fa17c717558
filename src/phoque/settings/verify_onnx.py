"""The settings of `phoque verify-onnx`."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from phoque.settings.export_onnx import PRECISIONS
from phoque.settings.fields import conflict, setting
from phoque.settings.job import JOB_GROUP, REPO, JobSettings

LEVELS = ("files", "graph", "ort", "node", "browser")


class VerifySettings(JobSettings):
    """The settings of one verification of an ONNX export."""

    reads: ClassVar = {"repo_id": "revision", "local_dir": None, "reference": None}
    main_input: ClassVar = "local_dir"
    extra: ClassVar = "onnx"
    groups: ClassVar = {
        "Export": "repo_id revision local_dir dtype reference level webgpu install",
        "Chat page": "serve port",
        "Output": "report_md",
        "Hub": "hub_patience",
        "Job": JOB_GROUP,
    }

    repo_id: str = setting(
        "", "Verify this export on the Hub (owner/name). Give either --repo-id or --local-dir.", pattern=rf"^$|{REPO}"
    )
    revision: str | None = setting(None, "Use this branch, tag or commit of --repo-id.", env="PHOQUE_ONNX_REVISION")
    local_dir: Path | None = setting(
        None, "Verify the export in this local folder. Give either --local-dir or --repo-id."
    )
    reference: str = setting(
        "",
        "Compare the export with its original model: a folder or Hub id. Without it, with the most "
        "precise of the exported precisions.",
    )
    dtype: list[str] = setting(
        [],
        f"Verify this precision: {', '.join(PRECISIONS)}. Separate several with commas. Without it, verify "
        "all that the export has.",
        env="PHOQUE_ONNX_DTYPE",
        commas=True,
    )
    level: Literal["files", "graph", "ort", "node", "browser"] | None = setting(
        None, "Stop after this level; ort is ONNX Runtime. Without it, go as far as this machine can."
    )
    webgpu: bool = setting(False, "In the browser, also compare the logits of WebGPU with those of WebAssembly.")
    install: bool = setting(
        False, "Install the Transformers.js client into phoque's cache without asking (500 MB, from npm)."
    )
    report_md: Path | None = setting(None, "Also write the verdict to this file as Markdown, for a model card.")
    serve: bool = setting(False, "Open the exported model in a chat page on this machine, instead of verifying it.")
    port: int = setting(8017, "Serve the chat page of --serve on this port; 0 picks a free one.", ge=0, le=65535)

    @model_validator(mode="after")
    def _no_node_in_a_job(self) -> Self:
        if self.on and (self.serve or self.webgpu or self.level in ("node", "browser")):
            flag = "--serve" if self.serve else "--webgpu" if self.webgpu else f"--level {self.level}"
            raise conflict(
                f"--on and {flag} exclude each other.",
                f"{flag} needs Node or a browser, which a Job does not have.",
                "Use --level ort in the Job, or verify on this machine.",
            )
        return self
