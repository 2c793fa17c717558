"""The dry run: what would be trained on what, estimated memory, what is in the run folder, and three masked rows."""

import re
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from phoque.console import describe_counts
from phoque.data.chat_template import IGNORE_INDEX, ChatTemplate, EncodedChat
from phoque.data.rows import Row
from phoque.distributed.launch import check_sharded, claim_gpu, count_processes
from phoque.hub.repo import Repo
from phoque.hub.store import Snapshot
from phoque.models.architectures import architecture_of
from phoque.models.lora import LoraOptions, add_lora_adapter
from phoque.results import DryRun
from phoque.services import Services
from phoque.settings.environment import submission
from phoque.settings.fields import Resolved
from phoque.settings.train import TrainSettings
from phoque.training.checkpoints import sort_checkpoints
from phoque.training.data_summary import (
    count_epochs,
    describe_held_out,
    describe_schemas,
    list_data_notes,
    list_data_problems,
)
from phoque.training.fingerprint import check_same_run, compute_identity
from phoque.training.memory import MemoryEstimate, estimate_memory, fit_to_gpu
from phoque.training.pinned import pin_recorded
from phoque.training.prepare import (
    Prepared,
    build_empty_model,
    check_rows_divisible,
    choose_micro_batch,
    find_store,
    lora_options,
    packing_for,
    prepare,
    rows_per_step,
    with_steps,
)
from phoque.training.report_to import check_services
from phoque.training.resume import is_fresh_start_continued
from phoque.training.run_record import list_run_files, read_record

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class TrainPlan(DryRun):
    """The plan of a run, with parameter counts, the memory estimate in GB, the data scan, and masked example rows."""

    parameters: dict[str, int]
    memory_gb: dict[str, float]
    data: dict[str, Any]
    preview: list[dict[str, Any]]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """{settings, facts, parameters, memory_gb, data, preview, notes, warnings}."""
        return {
            name: getattr(self, name)
            for name in ("settings", "facts", "parameters", "memory_gb", "data", "preview", "notes", "warnings")
        }


def plan_run(resolved: Resolved[TrainSettings], services: Services) -> TrainPlan:
    """Show what a run would do. Writes only to phoque's cache."""
    check_services(resolved.settings)
    pinned = pin_recorded(resolved, resolved.settings.folder, None, services)
    ready = prepare(pinned.resolved, services, weights=False, today=pinned.today)
    processes = _count_processes(resolved.settings)
    check_sharded(resolved.settings.fsdp, processes)
    micro_batch = choose_micro_batch(pinned.resolved.settings, processes, pinned.rows)
    dealt = replace(resolved, settings=resolved.settings.model_copy(update={"micro_batch": micro_batch}))
    planned = with_steps(dealt, ready.scan, processes, pinned.rows)
    s = planned.settings
    if pinned.rows is None:
        packed = rows_per_step(s, packing_for(s, ready.scan, static=True), processes)
        check_rows_divisible(packed, processes, has_begun=False)
    counts = count_parameters(ready.config, lora_options(s, ready))
    memory = fit_to_gpu(estimate_memory(ready, s, counts, processes), s, counts)
    return TrainPlan(
        facts=_list_facts(s, ready, counts, memory, services) | _describe_store(s, services),
        notes=list_data_notes(ready.scan, ready.dataset),
        warnings=list_data_problems(ready.scan, s),
        settings=planned.provenance(),
        parameters=counts,
        memory_gb=memory.to_json(),
        data=ready.scan.summary(),
        preview=[preview_row(ready.chat, row, encoded) for row, encoded in ready.scan.preview],
    )


def _count_processes(s: TrainSettings) -> int:
    """The processes that the run would have: those of a launcher, or of --gpus."""
    if launch := claim_gpu():
        return launch.size
    return count_processes(s.gpus) if s.gpus else 1


def count_parameters(config: "PretrainedConfig", options: LoraOptions) -> dict[str, int]:
    """Count the parameters of the text model and its adapter on the meta device, without weights."""
    model = build_empty_model(config)
    total = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    targets = architecture_of(config).lora_targets
    projections = sum(m.weight.numel() for name, m in model.named_modules() if re.fullmatch(targets, name))
    with torch.device("meta"):
        trained, _ = add_lora_adapter(model, options).get_nb_trainable_parameters()
    return {"base": total, "embedding": embedding, "projections": projections, "adapter": trained}


def count_system_tokens(chat: ChatTemplate) -> str:
    """Count the tokens of a short row without a system message: with phoque's and with the template's default."""
    example = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}]

    def length(messages: list[dict[str, str]]) -> int:
        return len(chat.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])

    return (
        f"a short row without a system message has {length(chat.with_system(example))} tokens; "
        f"{length(example)} with the template's own default (--default-system template)"
    )


def preview_row(chat: ChatTemplate, row: Row, encoded: EncodedChat) -> dict[str, Any]:
    """Split a row into spans of text that are trained on or not."""
    pairs = zip(encoded.ids, [label != IGNORE_INDEX for label in encoded.labels], strict=True)
    parts = [
        {"trained": trained, "text": chat.tokenizer.decode([token for token, _ in run])}
        for trained, run in groupby(pairs, key=lambda pair: pair[1])
    ]
    return {"source": row.source, "tokens": len(encoded.ids), "trained": encoded.trained_tokens, "parts": parts}


def _describe_store(s: TrainSettings, services: Services) -> dict[str, str]:
    """Describe the run's store; sends GET requests only."""
    from huggingface_hub.errors import RepositoryNotFoundError

    store = find_store(s, services)
    if store is None:
        return {}
    if not isinstance(repo := store, Repo):
        return {"kept in": f"{store.name}, with {_list_checkpoints(store.snapshot())}"}
    try:
        state = repo.snapshot()
    except RepositoryNotFoundError:
        return {"Hub repository": f"{repo.name} will be created, {s.access}"}
    private = repo.check_visibility(public=s.public)
    return {"Hub repository": f"{repo.name} is {'private' if private else 'PUBLIC'}, with {_list_checkpoints(state)}"}


def _list_checkpoints(state: Snapshot) -> str:
    return ", ".join(sort_checkpoints(state.checkpoint_folders())) or "no checkpoint"


def _describe_packing(s: TrainSettings, ready: Prepared) -> str:
    tokens = s.batch_size * ready.scan.mean_length
    if s.packing == "exact":
        return f"{s.batch_size} conversations in every step, about {tokens:,.0f} tokens, packed without padding"
    rows = packing_for(s, ready.scan, static=True)
    packed = f"bin-packed into {rows_per_step(s, rows)} x {rows.tokens:,} tokens"
    return f"about {s.batch_size} conversations and {tokens:,.0f} tokens, {packed}"


def _list_facts(
    s: TrainSettings, ready: Prepared, counts: dict[str, int], memory: MemoryEstimate, services: Services
) -> dict[str, str]:
    scan = ready.scan
    facts = {
        "model": f"{ready.source.name} ({ready.source.origin}), {counts['base'] / 1e6:,.0f} M parameters, "
        f"with an adapter of {counts['adapter'] / 1e6:,.1f} M",
        "data": f"{ready.dataset.name}: {describe_schemas(scan)}, {scan.mean_length:.0f} tokens on average, "
        f"{scan.trained_tokens / sum(scan.lengths):.0%} of them trained on",
        "sources": describe_counts(scan.sources),
        "split": f"{ready.dataset.split}, of {', '.join(ready.dataset.splits)}",
        "held out": describe_held_out(scan, s),
        "step": _describe_packing(s, ready),
        "length": f"{s.max_steps} steps, {count_epochs(s, scan):.1f} epochs",
        "memory": memory.describe(),
        "system": count_system_tokens(ready.chat),
        "run folder": _describe_folder(s, ready, services),
    }
    if s.with_control:
        runs = f"{s.control_seeds} run{'s' if s.control_seeds > 1 else ''} of as many steps"
        facts["control"] = f"{runs}, on the base model's answers to the same conversations, in {s.folder}/control-1"
    if scan.sources.keys() == {"unknown"}:
        del facts["sources"]
    if len(ready.dataset.splits) == 1:
        del facts["split"]
    return facts


def _describe_folder(s: TrainSettings, ready: Prepared, services: Services) -> str:
    """What the run folder holds, and where this run would continue. Raises UsageError if it holds a different run."""
    record = read_record(s.folder)
    names = sort_checkpoints(p.name for p in s.folder.glob("checkpoint-*"))
    newest = names[0] if names else None
    if s.fresh_start and not (record and is_fresh_start_continued(record, s, submission())):
        there = list_run_files(s.folder)
        return f"{s.folder}, --fresh-start would delete {', '.join(there)}" if there else f"{s.folder}, new"
    if record is None:
        return f"{s.folder}, {f'holds {newest}' if newest else 'new'}"
    identity = compute_identity(s, ready.source, ready.dataset, ready.chat, ready.scan, services)
    recorded = record["fingerprint"]
    check_same_run(recorded, identity.for_record(recorded), s.allow_change, str(s.folder), s.other_places)
    if "result" in record:
        return f"{s.folder}, holds this run, which is complete"
    return f"{s.folder}, holds this run; it continues from {newest or 'step 0'}"
