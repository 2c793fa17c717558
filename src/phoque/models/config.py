"""A model's config and tokenizer: loaded by transformers, or copied as files."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phoque.errors import UsageError, first_line
from phoque.files import read_json_object
from phoque.models.architectures import architecture_of
from phoque.models.source import (
    UNUSED_PREFIXES,
    Source,
    check_tokenizer,
    list_tokenizer_files,
    list_vocabulary_files,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"


def load_config(source: Source) -> "PretrainedConfig":
    """The model's config. Raises UsageError if transformers or phoque does not know the architecture."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # a damaged value raises whatever transformers does with it
        raise UsageError(
            what=f"The config of {source.name} cannot be read.",
            why=first_line(error),
            fix="Check which model was named.",
        ) from error
    architecture_of(config)
    return config


def max_conversation_tokens(config: "PretrainedConfig") -> tuple[int | None, str]:
    """The longest conversation that a model can be trained on, and why; None if its config names no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions, f"it has {positions:,} positions" if positions else ""


def head_dim_of(config: "PretrainedConfig") -> int:
    """The size of one attention head of a text model."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def logits_scaling_of(config: "PretrainedConfig") -> float:
    """The number by which a text model divides its logits; Granite has one."""
    return getattr(config, "logits_scaling", 1.0)


def sliding_window_of(config: "PretrainedConfig") -> int | None:
    """The sliding window of a text model's attention in tokens; None if no layer has one."""
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    return window if window and (not types or "sliding_attention" in types) else None


def read_end_tokens(folder: Path) -> list[int]:
    """The token ids at which a model's generation config ends an answer; none if it has no such file.

    Raises UsageError for a damaged one.
    """
    file = folder / "generation_config.json"
    ends = read_json_object(file).get("eos_token_id") if file.is_file() else None
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def find_tokenizer_folder(base: Path, adapter: Path | None) -> Path:
    """The folder with the tokenizer that an adapter was trained with: its own if it is complete, else the base's."""
    vocabulary = list_vocabulary_files(adapter) if adapter else []
    has_own = any(not file.name.startswith(UNUSED_PREFIXES) for file in vocabulary)
    return adapter if adapter and has_own and (adapter / TOKENIZER_CONFIG).is_file() else base


def read_chat_template(folder: Path) -> str | dict[str, str] | None:
    """The chat template in a folder, or the templates by name; None if it has none.

    Older versions of transformers wrote it into tokenizer_config.json, newer ones write it into a file of its own.
    """
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    if not (folder / TOKENIZER_CONFIG).is_file():
        return None
    template = read_json_object(folder / TOKENIZER_CONFIG).get("chat_template")
    return {one["name"]: one["template"] for one in template} if isinstance(template, list) else template


def load_tokenizer(source: Source, adapter: Path | None = None) -> "PreTrainedTokenizerBase":
    """The model's tokenizer, which has a chat template. Raises UsageError if it has none.

    The tokenizer and the template are those in `adapter`, the folder of an adapter, as far as it has them: it was
    trained with them.
    """
    from transformers import AutoTokenizer

    folder, name, of_model = find_tokenizer_folder(source.folder, adapter), source.name, {}
    if folder == source.folder:
        check_tokenizer(folder, name)
    else:  # an adapter has no config, by whose model type transformers chooses the tokenizer's class
        name, of_model = str(adapter), {"config": load_config(source)}
    # transformers prefers mistral-common's own tokenizer where that is installed, but it renders no template
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, mistral_format=False, trust_remote_code=False, **of_model
        )
    except Exception as error:  # whatever the reader of a damaged or incomplete tokenizer raises
        raise UsageError(
            what=f"The tokenizer of {name} cannot be loaded.",
            why=first_line(error),
            fix="Copy the tokenizer's files again from the model that it was made from.",
        ) from error
    template = read_chat_template(adapter) if adapter else None
    if template or folder != source.folder:
        tokenizer.chat_template = template or read_chat_template(source.folder)
    if not tokenizer.chat_template:
        raise UsageError(
            what=f"{source.name} has no chat template.",
            why="It is not a chat model.",
            fix="Use its instruction-tuned version.",
        )
    return tokenizer


def copy_tokenizer(source: Path, folder: Path, chat_template: str | dict[str, str] | None = None) -> dict[str, Any]:
    """Copy a tokenizer's files, with the chat template in two places; return its tokenizer_config.json.

    Transformers.js reads the template from tokenizer_config.json only, transformers from chat_template.jinja. Another
    `chat_template` replaces the one in `source`.
    """
    for file in list_tokenizer_files(source):
        if not file.name.startswith(UNUSED_PREFIXES):
            shutil.copyfile(file, folder / file.name)
    settings = read_json_object(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    template = chat_template or read_chat_template(source)
    if isinstance(template, str):
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
        settings["chat_template"] = template
    elif template:  # several templates by name have only one place
        (folder / TEMPLATE).unlink(missing_ok=True)
        settings["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False))
    return settings
