"""Stop tokens: the one with which a chat template ends an answer, which a model's own configs may not name.

The configs of a base model often name the end of a text alone, and the template of its fine-tunes another token.
"""

from pathlib import Path
from typing import Any

from phoque.data.chat_template import ANSWER, QUESTION, ChatTemplate
from phoque.data.turns import BadRow
from phoque.errors import UsageError
from phoque.models.config import read_end_tokens


def find_stop_token(tokenizer: Any) -> int | None:
    """The token with which the chat template ends an answer; None where it has none that phoque can locate."""
    try:
        labels = ChatTemplate(tokenizer, "template", 1 << 20).encode([QUESTION, ANSWER]).labels
    except (UsageError, BadRow):
        return None
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((label for label in reversed(labels) if label in special), None)


def list_stop_tokens(tokenizer: Any, folder: Path) -> list[int]:
    """The tokens that end an answer: the template's first, then those of a model's generation config and tokenizer."""
    found = [find_stop_token(tokenizer), *read_end_tokens(folder), tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in found if token is not None))


def with_stop_token(ends: int | list[int] | None, stop: int | None) -> int | list[int] | None:
    """The `eos_token_id` of a config with the stop token; as it is if it names it already."""
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return ends if stop is None or stop in listed else [*listed, stop]


def stop_at_template(model: Any, tokenizer: Any) -> Any:
    """Let the model's answers end at the template's stop token, too; return the model."""
    config = model.generation_config
    ends = model.config.eos_token_id if config.eos_token_id is None else config.eos_token_id
    config.eos_token_id = with_stop_token(ends, find_stop_token(tokenizer))
    return model
