"""The dry run: every value and its source, what the run would cost, and three rows with their loss mask."""

from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from phoque.console import Console
from phoque.data.chat_template import IGNORED, ChatTemplate, Encoded
from phoque.data.rows import Row
from phoque.errors import PublicRepoError
from phoque.settings.fields import Resolved
from phoque.settings.train import TrainSettings
from phoque.training.checkpoints import in_order
from phoque.training.prepare import Prepared, hub_repo, packing_of, prepare

GB = 1e9
BYTES = {"nf4": 0.516, "fp8": 1.0, "bf16": 2.0, "none": 4.0}  # a weight of a projection; nf4 with double quantisation


def plan(resolved: Resolved[TrainSettings], cache: Path, console: Console) -> dict[str, Any]:
    """What `phoque train` would do: {settings, facts, data, preview}. Writes nothing but phoque's own cache."""
    s = resolved.settings
    ready = prepare(resolved, cache, console, weights=False)
    counts = parameter_counts(ready.config, s.lora_rank)
    return {
        "settings": resolved.provenance(),
        "facts": _facts(s, ready, counts) | system_cost(ready.chat) | _hub_facts(resolved, console),
        "parameters": counts,
        "memory_gb": memory_estimate(ready, s, counts),
        "data": ready.scan.summary(),
        "preview": [preview(ready.chat, row, encoded) for row, encoded in ready.scan.preview],
    }


def parameter_counts(config: Any, rank: int) -> dict[str, int]:
    """Parameters of the text model and of its adapter, counted on shapes alone."""
    from transformers import AutoModelForCausalLM

    from phoque.models.lora import with_adapter

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config.get_text_config())
        held = sum(p.numel() for p in model.parameters())
        embedded = model.get_input_embeddings().weight.numel()
        trained, _ = with_adapter(model, rank, rank, 0.0).get_nb_trainable_parameters()
    return {"base": held, "embedding": embedded, "adapter": trained}


def memory_estimate(ready: Prepared, s: TrainSettings, counts: dict[str, int]) -> dict[str, float]:
    """GB of weights, adapter with its Adam states, and activations of one forward pass; an estimate, and says so."""
    config = ready.config.get_text_config()
    rows = packing_of(s, ready.scan, static=False)
    tokens = rows.count * rows.mean if rows.exact else rows.tokens
    width = BYTES["none" if s.quantization == "none" else "bf16"]
    projections = (counts["base"] - counts["embedding"]) * BYTES[s.quantization]
    # What a decoder layer keeps for its backward pass, in units of hidden and intermediate activations: the inputs of
    # two norms and seven projections, the rotated heads, and LoRA's copies of its inputs; recomputed when checkpointed.
    kept = 14 * config.hidden_size + 4 * config.intermediate_size
    layers = 1 if s.gradient_checkpointing else config.num_hidden_layers
    activations = tokens * width * (layers * kept + config.num_hidden_layers * config.hidden_size)
    parts = {
        "weights": (projections + counts["embedding"] * width) / GB,
        "adapter_and_optimizer": counts["adapter"] * 16 / GB,
        "activations": activations / GB,
    }
    return {name: round(value, 2) for name, value in parts.items()} | {"sum": round(sum(parts.values()), 2)}


def system_cost(chat: ChatTemplate) -> dict[str, str]:
    """Tokens that a row without a system message costs: with what phoque gives it, and with the template's default."""
    ask = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}]

    def length(messages: list[dict[str, str]]) -> int:
        return len(chat.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])

    return {
        "a short row without a system message": f"{length(chat.with_system(ask))} tokens "
        f"({length(ask)} with the template's own default: --default-system template)"
    }


def preview(chat: ChatTemplate, row: Row, encoded: Encoded) -> dict[str, Any]:
    """A row as runs of text that are trained on or not."""
    pairs = zip(encoded.ids, [label != IGNORED for label in encoded.labels], strict=True)
    parts = [
        {"trained": trained, "text": chat.tokenizer.decode([token for token, _ in run])}
        for trained, run in groupby(pairs, key=lambda pair: pair[1])
    ]
    return {"source": row.source, "tokens": len(encoded.ids), "trained": encoded.trained, "parts": parts}


def _hub_facts(resolved: Resolved[TrainSettings], console: Console) -> dict[str, str]:
    """What lies in the repository of the run, asked with GET alone."""
    from huggingface_hub.errors import RepositoryNotFoundError

    repo = hub_repo(resolved, console)
    if repo is None:
        return {}
    try:
        there = repo.snapshot()
    except RepositoryNotFoundError:
        return {"Hub repository": f"{repo.name} will be made, {'PUBLIC' if resolved.settings.public else 'private'}"}
    if not (private := repo.private()) and not resolved.settings.public:
        raise PublicRepoError(repo.name)
    found = ", ".join(in_order(there.folders())) or "no checkpoint"
    return {"Hub repository": f"{repo.name} is {'private' if private else 'PUBLIC'} and holds {found}"}


def _packed(s: TrainSettings, ready: Prepared) -> str:
    if s.packing == "exact":
        return "exactly so many rows, however long"
    rows = packing_of(s, ready.scan, static=True)
    return f"packed best-fit into {s.accumulation} x {rows.tokens:,} tokens"


def _facts(s: TrainSettings, ready: Prepared, counts: dict[str, int]) -> dict[str, str]:
    memory = memory_estimate(ready, s, counts)
    return {
        "base": f"{ready.source.name} ({ready.source.origin}), {counts['base'] / 1e6:,.0f} M parameters",
        "adapter": f"{counts['adapter'] / 1e6:,.1f} M parameters",
        "memory": f"about {memory['sum']:.1f} GB: weights {memory['weights']:.1f}, adapter and its Adam states "
        f"{memory['adapter_and_optimizer']:.1f}, activations {memory['activations']:.1f} (an estimate)",
        "data": f"{ready.scan.good} rows of {ready.scan.mean_length:.0f} tokens; a step is "
        f"{s.batch_size} rows, about {s.batch_size * ready.scan.mean_length:,.0f} tokens ({_packed(s, ready)})",
        "run folder": str(s.folder),
    }
