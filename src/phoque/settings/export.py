"""Settings that the exports share: which model, on which conversations it is measured, and where it goes."""

from pathlib import Path
from typing import ClassVar

from phoque.files import EXPORT_RECORD
from phoque.settings.fields import name_after, setting
from phoque.settings.job import REPO, PublishedSettings
from phoque.settings.presets import PRESETS


class ModelExportSettings(PublishedSettings):
    """Base class of the settings of export-onnx and export-gguf."""

    keeps: ClassVar = "push_repo_id"
    main_input: ClassVar = "adapter_source"
    output_record: ClassVar = (EXPORT_RECORD, "an export")
    reads: ClassVar = {
        "adapter_source": "adapter_revision",
        "merged_dir": "merged_revision",
        "base": "revision",
        "chats": None,
    }

    preset: str = setting(
        "",
        "Take the base model of this preset (ministral-3b or demo) if no model and no adapter is given.",
    )
    adapter_source: str = setting(
        "",
        "Merge this adapter first and export the merged model: an adapter folder, a run folder or a Hub repository.",
        env="ADAPTER_SOURCE",
    )
    adapter_revision: str | None = setting(None, "Use this branch, tag or commit of --adapter-source on the Hub.")
    # not named base_model, because presets set base_model and an adapter's config names its own base
    base: str = setting(
        "",
        "Merge the adapter into this base model: Hub id, local folder or .gguf file. Without it, the "
        "base that the adapter's config names. Without an adapter, the base itself is exported.",
        env="BASE_MODEL",
    )
    revision: str | None = setting(
        None,
        "Use this branch, tag or commit of the base model. If --base is not given either, the adapter's "
        "config decides.",
    )
    merged_dir: str = setting(
        "", "Export this merged model: a local folder, or a model or dataset repository on the Hub."
    )
    merged_revision: str | None = setting(None, "Use this branch, tag or commit of --merged-dir on the Hub.")
    merged_out_dir: Path | None = setting(
        None, "Keep the merged or downloaded model in this folder. Without it, the model stays in the cache."
    )
    chats: str = setting(
        "seal",
        "Calibrate quantized precisions, and measure accuracy, on these conversations: a Hub dataset, a file, a "
        "folder, or `seal` (bundled).",
    )
    chats_split: str = setting("train", "Read this split of --chats.")
    chats_config: str | None = setting(
        None, "Use this config of --chats, where a dataset has several; if it does not exist, the error lists them."
    )
    accuracy: bool = setting(
        True,
        "Measure each precision's KL divergence and next-token agreement with the original model. --no-accuracy saves "
        "time.",
    )
    verify_strict: bool = setting(
        True,
        "Delete the export and exit with code 1 if it does not pass verification. --no-verify-strict keeps it and "
        "prints a warning.",
    )
    push_repo_id: str | None = setting(
        None,
        "Push the export to this Hub repository (owner/name). It is created private unless --public is given.",
        pattern=REPO,
    )

    @property
    def source_name(self) -> str:
        """The name of the model that is exported, after which its export is called."""
        preset = PRESETS.get(self.preset, {}).get("base_model", "")
        return name_after(self.adapter_source or self.merged_dir or self.base or preset)
