"""`phoque psm-probe`: run a probe from its settings and write the run folder."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phoque.console import Console
from phoque.distributed.processes import current
from phoque.errors import UsageError
from phoque.files import run_folder
from phoque.models.adapter_source import AdapterSource, find_adapter, find_named_controls, read_run_record
from phoque.models.architectures import architecture_of
from phoque.models.config import load_config, load_tokenizer
from phoque.models.load import load_model
from phoque.models.lora import attach_adapter
from phoque.models.source import Source
from phoque.models.stop_tokens import stop_at_template
from phoque.probes.destination import prepare_probe
from phoque.probes.persona import MIN_QUESTIONS, Persona, limit_questions, write_persona
from phoque.probes.persona_source import (
    check_names_persona,
    fetch_if_remote,
    find_base_model,
    find_persona,
    show_settings,
)
from phoque.probes.persona_vectors import files, report
from phoque.probes.persona_vectors.model import ProbeModel
from phoque.probes.persona_vectors.probe import Probe, ProbeResult
from phoque.probes.roles import Role, load_roles
from phoque.probes.scorers import Context, Scorer, make_scorer
from phoque.probes.scorers.model import find_lexicon_tokens
from phoque.probes.shared_inference import mean_nll
from phoque.probes.verdicts import MIN_FOR_YES
from phoque.results import DryRun, RunFolderResult, library_versions
from phoque.services import Services
from phoque.settings.fields import Resolved
from phoque.settings.psm_probe import PsmSettings
from phoque.version import __version__

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

RULE = (
    "highest trait on the validation questions among settings within the coherence limits; "
    "results are on the test questions"
)


@dataclass(frozen=True, kw_only=True)
class ProbeRunResult(RunFolderResult):
    """The verdicts of a probe, the steering setting that was selected, and the file of the persona."""

    verdicts: dict[str, Any]
    selected: dict[str, Any]
    persona: str


@dataclass(frozen=True, kw_only=True)
class ProbePlan:
    """The resolved inputs of a probe, and what a dry run shows of them."""

    source: Source
    tuned: AdapterSource | None
    adapters: dict[str, AdapterSource]  # `tuned`, and the controls as `control`, `control-2` and so on
    persona: Persona
    roles: tuple[Role, ...]
    config: "PretrainedConfig"
    tokenizer: "PreTrainedTokenizerBase"
    steered_blocks: list[int]
    facts: dict[str, Any]
    warnings: list[str]


def run_probe(resolved: Resolved[PsmSettings], services: Services, *, dry_run: bool) -> ProbeRunResult | DryRun | None:
    """Probe a model for a persona as the settings say, and write the run folder.

    Where several processes probe together, each calls this, and process 0 alone writes and returns a result. Raises
    UsageError for invalid input, RunError for a failed upload if --fail-on-artifacts-upload-error is set.
    """
    s, console, start = resolved.settings, services.console, time.monotonic()
    resolve_inputs = partial(make_plan, resolved, services, weights=not dry_run)
    plan, destination = prepare_probe("psm-probe", resolve_inputs, s, services, dry_run=dry_run)
    if dry_run:
        return DryRun(plan.facts, show_settings(resolved, "model_source", plan.source, plan.tuned), plan.warnings)
    current().check_same((plan.source.weights, plan.persona.sha256, list(plan.facts["adapters"].values())))
    if not s.persona:
        _show_proposed(plan.persona, console)
    for text in plan.warnings:
        console.warn(text)
    probe_model = ProbeModel(plan.tokenizer, plan.persona, plan.roles, s, console)
    context, scorers = _make_scorers(probe_model, plan.source, s, services)
    console.stage(f"loading {plan.source.name} in {s.quantization}")
    probe_model.model = load_model(plan.source, s.quantization, import_meanwhile="peft" if plan.adapters else "").eval()
    stop_at_template(probe_model.model, plan.tokenizer)
    for key, adapter in plan.adapters.items():
        console.stage(f"attaching {adapter.label}")
        probe_model.model = attach_adapter(probe_model.model, adapter.folder, architecture_of(plan.config), key)
    probe_result = Probe(probe_model, scorers, context, plan.steered_blocks).run(list(plan.adapters))
    if probe_result is None:
        return None
    summary = _build_summary(
        resolved,
        plan,
        result=probe_result,
        lexicon_token_ids=context.lexicon_token_ids,
        warnings=plan.warnings + probe_result.warnings,
    )
    summary["run"]["seconds"] = round(time.monotonic() - start, 1)
    folder = _write_run_folder(s, plan, probe_model.model.config.model_type, probe_result, summary)
    for text in probe_result.warnings:
        console.warn(text)
    upload = destination.deliver("psm-probe", folder, summary["verdicts"], s, services)
    return ProbeRunResult(
        folder=str(folder),
        report=str(folder / report.REPORT),
        verdicts=summary["verdicts"],
        selected=summary["selected"],
        persona=str(folder / files.PERSONA),
        warnings=summary["warnings"],
        repo=upload.repo if upload else None,
        commit=upload.commit if upload else None,
    )


def make_plan(resolved: Resolved[PsmSettings], services: Services, *, weights: bool) -> ProbePlan:
    """Resolve every input that the settings name. Raises UsageError for one that is missing or does not fit."""
    s = resolved.settings
    check_names_persona(resolved)
    tuned = find_adapter(s.adapter_source, s.adapter_revision, services) if s.adapter_source else None
    adapters = find_named_controls(s.control_adapter, tuned, services) | ({"tuned": tuned} if tuned else {})
    source = find_base_model(resolved, "model_source", tuned, services, weights=weights)
    record = tuned.run_record() if tuned else read_run_record(source.folder)
    persona, warnings = find_persona(s, services, record)
    data = ((record or {}).get("data") or {}).get("name")
    if not resolved.origins["persona"].is_given and s.persona and data not in (None, s.persona):
        warnings.append(
            f"the persona is the preset's {s.persona}, but the adapter was trained on {data}: pass --persona"
        )
    persona = limit_questions(persona, s.questions)
    if min(len(persona.test), len(persona.heldout)) < MIN_FOR_YES:
        warnings.append(f"fewer than {MIN_FOR_YES} held-out or test questions: some verdicts cannot be yes")
    roles = load_roles(fetch_if_remote(s.roles, "--roles", services), persona)
    config = load_config(source)
    blocks = config.get_text_config().num_hidden_layers
    steered_blocks = _resolve_steered_blocks(s, blocks)
    facts = {
        "persona": persona.name,
        "roles": len(roles),
        "questions": {key: len(getattr(persona, key)) for key in MIN_QUESTIONS},
        "model": f"{source.name} ({source.origin})",
        "adapters": {key: adapter.label for key, adapter in adapters.items()},
        "blocks": blocks,
        "steered": steered_blocks,
    }
    if not s.persona:
        facts |= {"proposed prompts": list(persona.persona), "proposed words": ", ".join(persona.lexicon)}
    return ProbePlan(
        source=source,
        tuned=tuned,
        adapters=adapters,
        persona=persona,
        roles=roles,
        config=config,
        tokenizer=load_tokenizer(source, tuned.folder if tuned else None),
        steered_blocks=steered_blocks,
        facts=facts,
        warnings=warnings,
    )


def _show_proposed(persona: Persona, console: Console) -> None:
    """Print the first prompt and the words of a persona that was taken from data."""
    console.say(f"{persona.name}: {', '.join(persona.lexicon)}; the first of {len(persona.persona)} prompts is")
    for line in persona.persona[0].splitlines():
        console.say(f"  {line}")
    console.say(f"{files.PERSONA}, beside the report, will have all of it: to be edited, and passed with --persona")


def _resolve_steered_blocks(s: PsmSettings, blocks: int) -> list[int]:
    layers = s.steered_blocks(blocks)
    if invalid := [layer for layer in layers if layer >= blocks]:
        raise UsageError(
            what=f"There is no block {invalid[0]}.",
            why=f"The model has {blocks} blocks, counted from 0.",
            fix="Check --steer-blocks.",
        )
    return layers


def _make_scorers(
    probe_model: ProbeModel, source: Source, s: PsmSettings, services: Services
) -> tuple[Context, list[Scorer]]:
    secrets = services.secrets
    key = secrets.openai_api_key.get_secret_value() if secrets.openai_api_key else None

    def nll(rows: Sequence[Any]) -> list[float]:
        with probe_model.use_base():
            return mean_nll(probe_model.model, rows)

    context = Context(
        persona=probe_model.persona,
        lexicon_token_ids=find_lexicon_tokens(probe_model.tokenizer, probe_model.persona.lexicon),
        token=secrets.hub,
        api_key=key,
        nll=nll,
        prompt_ids=probe_model.prompt_ids,
        model=f"{source.weights} {s.quantization}",
        cache=services.cache,
        paraphrases=None if s.scorer[0] == "contrast" else 1,  # as the trait it is read precisely
    )
    return context, [make_scorer(spec, context) for spec in dict.fromkeys(s.scorer)]


def _build_summary(
    resolved: Resolved[PsmSettings],
    plan: ProbePlan,
    *,
    result: ProbeResult,
    lexicon_token_ids: dict[int, str],
    warnings: list[str],
) -> dict[str, Any]:
    versions = library_versions("torch", "transformers", "peft", "numpy")
    source, persona = plan.source, plan.persona
    selected = result.selected
    return {
        "schema_version": files.SCHEMA,
        "run": {"command": "psm-probe", "phoque": __version__, "versions": versions, "device": _device_name()},
        "models": {
            "base": {"name": source.name, "revision": source.revision, "origin": source.origin},
            "adapters": plan.facts["adapters"],
        },
        "persona": {"name": persona.name, "sha256": persona.sha256, "texts": vars(persona)},
        "config": show_settings(resolved, "model_source", source, plan.tuned),
        "verdicts": result.verdicts,
        "selected": {
            "layer": selected.layer,
            "coeff_rel_resid": selected.coefficient,
            "layer_indexing": "block_output_0based",
            "coherent": result.has_coherent,
            "rule": RULE,
        },
        "trait": {"scorer": result.trait, "column": result.columns[result.trait]},
        "scorer_columns": result.columns,
        "voices": {
            name: {"share": v.share, "base_share": v.base_share, "n": v.n, "gain": v.gain, **v.ranking.to_json()}
            for name, v in result.shares.items()
        },
        "rankings": {name: ranking.to_json() for name, ranking in result.rankings.items()},
        "causes": vars(result.causes) if result.causes else None,
        "differences": [vars(reading) for reading in result.differences],
        "doses": [vars(dose) for dose in result.doses],
        "side_effects": {name: vars(effects) for name, effects in result.side_effects.items()},
        "false_alarms": result.false_alarms,
        "telling_words": {role: result.profile.telling_words(role) for role in result.profile.roles},
        "conditions": result.conditions,
        "contrasts": result.contrasts,
        "sweep": result.sweep,
        "n_roles": len(result.vectors.roles),
        "moved_over_steered_blocks": result.mean_shifts,
        "scorer_agreement": result.agreement,
        "logprob_tokens": {str(token): word for token, word in lexicon_token_ids.items()},
        "tokens": result.token_counts | {"position_0": "never a response token, so never counted"},
        "warnings": warnings,
        "limitations": [
            "The model may represent the persona in other ways than by the direction that was found.",
            "Scores depend on the scorers that were used; the first of them selected the steering setting.",
            f"{len(persona.test)} test questions: small effects cannot be detected.",
            "Not asked: whether a code word or a topic triggers the persona. All questions are plain and short.",
        ],
    }


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _write_run_folder(
    s: PsmSettings, plan: ProbePlan, model_type: str, result: ProbeResult, summary: dict[str, Any]
) -> Path:
    """Write the run folder under a temporary name and rename it when it is complete; return its path."""
    with run_folder(s.output_dir, "psm") as (staging, folder):
        files.write_layers(staging / files.LAYERS, result.layers)
        files.write_answers(staging / files.ANSWERS, result.answers, s.seed)
        metadata = {
            "model_id": plan.source.name,
            "revision": plan.source.revision,
            "prompts_sha256": plan.persona.sha256,
            "model_type": model_type,
        }
        if not files.write_vectors(staging, result.vectors, result.selected, metadata):
            summary["warnings"].append(
                "block 0 was selected, which llama.cpp cannot steer: there is no control_vector.gguf"
            )
        files.write_summary(staging / files.SUMMARY, summary)
        write_persona(plan.persona, staging / files.PERSONA)
        report.write_report(staging, folder.name)
    return folder
