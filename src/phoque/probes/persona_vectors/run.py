"""`phoque psm-probe`: from settings to a run folder."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from phoque import __version__
from phoque.console import Console
from phoque.errors import PhoqueError
from phoque.files import run_folder
from phoque.hub.client import Hub
from phoque.hub.upload import opened_for_run, pushed_run
from phoque.inference.likelihood import mean_nll
from phoque.merging.run import find_adapter
from phoque.models.architectures import architecture_of
from phoque.models.load import load_config, load_model, load_tokenizer
from phoque.models.lora import attach_adapter
from phoque.models.source import Source, resolve
from phoque.probes.persona import Persona
from phoque.probes.persona_source import find_persona
from phoque.probes.persona_vectors import files, report
from phoque.probes.persona_vectors.model import ProbeModel
from phoque.probes.persona_vectors.probe import Found, Probe
from phoque.probes.scorers import Context, Scorer, scorer_for
from phoque.probes.scorers.model import lexicon_tokens
from phoque.settings.fields import Resolved
from phoque.settings.psm_probe import PsmSettings

RULE = (
    "highest trait on the validation questions among settings within the limits of coherence; "
    "reported on the test questions"
)


def probe(resolved: Resolved[PsmSettings], cache: Path, console: Console, dry_run: bool) -> dict[str, Any]:
    """Do what the settings ask for; return {folder, verdicts, selected, ...}.

    Raises PhoqueError (2) for what cannot be probed, and (1) for a failed upload if that was asked for.
    """
    s, begun = resolved.settings, time.monotonic()
    hub = Hub(resolved.secrets.hub, console.say, s.hub_patience)
    persona, warnings = find_persona(s, resolved.secrets.hub, cache, hub)
    if not s.model_source:
        raise PhoqueError("No model.", "--model-source is empty.", "Name one, or use a --preset.")
    source = resolve(s.model_source, s.revision, resolved.secrets.hub, cache, console.say, weights=not dry_run)
    wanted = [
        (name, a, r)
        for name, a, r in (("control", s.control_adapter, None), ("tuned", s.adapter_source, s.adapter_revision))
        if a
    ]
    adapters = {name: find_adapter(a, r, hub, cache) for name, a, r in wanted}
    blocks = load_config(source).get_text_config().num_hidden_layers
    layers = _steered(s, blocks)
    tokenizer = load_tokenizer(source)
    facts = {
        "persona": persona.name,
        "model": f"{source.name} ({source.origin})",
        "adapters": {name: f"{a}{adapters[name][1]}" for name, a, _ in wanted},
        "blocks": blocks,
        "steered": layers,
    }
    if dry_run:
        return facts | {"settings": resolved.provenance(), "warnings": warnings}
    for text in warnings:
        console.warn(text)
    repo = opened_for_run(resolved, hub, console)
    lab = ProbeModel(tokenizer, persona, s, console)
    context, scorers = _scorers(lab, source, resolved, cache)
    lab.model = load_model(source, s.quantization).eval()  # when all else is known to be fine
    for name, (folder, _) in adapters.items():
        lab.model = attach_adapter(lab.model, folder, architecture_of(load_config(source)), name)
    found = Probe(lab, scorers, context, layers).run(list(adapters))
    summary = _summary(resolved, persona, source, facts, found, context.watched, warnings + found.warnings)
    summary["run"]["seconds"] = round(time.monotonic() - begun, 1)
    folder = _written(s, source, persona, lab.model.config.model_type, found, summary)
    result = {
        "folder": str(folder),
        "report": str(folder / report.NAME),
        "verdicts": summary["verdicts"],
        "selected": summary["selected"],
        "warnings": summary["warnings"],
    }
    for text in found.warnings:
        console.warn(text)
    if repo:
        result |= pushed_run(repo, folder, s, console)
    return result


def _steered(s: PsmSettings, blocks: int) -> list[int]:
    layers = s.steered_blocks(blocks)
    if wrong := [layer for layer in layers if layer >= blocks]:
        raise PhoqueError(
            f"There is no block {wrong[0]}.", f"The model has {blocks}, which count from 0.", "Check --sweep-layers."
        )
    return layers


def _scorers(
    lab: ProbeModel, source: Source, resolved: Resolved[PsmSettings], cache: Path
) -> tuple[Context, list[Scorer]]:
    secrets, s = resolved.secrets, resolved.settings
    key = secrets.openai_api_key.get_secret_value() if secrets.openai_api_key else None

    def nll(rows: Sequence[Any]) -> list[float]:
        with lab.base():
            return mean_nll(lab.model, rows)

    context = Context(
        persona=lab.persona,
        watched=lexicon_tokens(lab.tokenizer, lab.persona.lexicon),
        token=secrets.hub,
        api_key=key,
        nll=nll,
        prompt_ids=lab.prompt_ids,
        model=f"{source.weights} {s.quantization}",
        cache=cache,
    )
    return context, [scorer_for(spec, context) for spec in dict.fromkeys(s.scorer)]


def _summary(
    resolved: Resolved[PsmSettings],
    persona: Persona,
    source: Source,
    facts: dict[str, Any],
    found: Found,
    watched: dict[int, str],
    warnings: list[str],
) -> dict[str, Any]:
    from importlib.metadata import version

    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "numpy")}
    chosen = found.chosen
    return {
        "schema_version": files.SCHEMA,
        "run": {"command": "psm-probe", "phoque": __version__, "versions": libraries, "device": _device()},
        "models": {
            "base": {"name": source.name, "revision": source.revision, "origin": source.origin},
            "adapters": facts["adapters"],
        },
        "persona": {"name": persona.name, "sha256": persona.sha256, "texts": vars(persona)},
        "config": resolved.provenance(),
        "verdicts": found.verdicts,
        "selected": {
            "layer": chosen.layer,
            "coeff_rel_resid": chosen.coefficient,
            "layer_indexing": "block_output_0based",
            "coherent": found.coherent,
            "rule": RULE,
        },
        "trait": {"scorer": found.trait, "column": found.columns[found.trait]},
        "scorer_columns": found.columns,
        "conditions": found.conditions,
        "contrasts": found.contrasts,
        "sweep": found.sweep,
        "moved_over_steered_blocks": found.moved,
        "scorer_agreement": found.agreement,
        "logprob_tokens": {str(token): word for token, word in watched.items()},
        "tokens": found.tokens | {"position_0": "never a response token, so never counted"},
        "warnings": warnings,
        "limitations": [
            "A direction that can be read and that steers is not the only way the persona may be held.",
            "Scores are those of the scorers that were asked for; the first of them chose the setting.",
            f"{len(persona.test)} test questions: small effects are not found.",
        ],
    }


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _written(
    s: PsmSettings, source: Source, persona: Persona, model_type: str, found: Found, summary: dict[str, Any]
) -> Path:
    """The run folder: written under a temporary name, and moved into place when it is whole."""
    with run_folder(s.output_dir.expanduser(), "psm") as (staging, folder):
        files.write_layers(staging / files.LAYERS, found.layers)
        files.write_answers(staging / files.ANSWERS, found.answers, s.seed)
        about = {
            "model_id": source.name,
            "revision": source.revision,
            "prompts_sha256": persona.sha256,
            "model_type": model_type,
        }
        if not files.write_vectors(staging, found.vectors, found.chosen, about):
            summary["warnings"].append(
                "block 0 was chosen, which llama.cpp cannot steer: there is no control_vector.gguf"
            )
        files.write_summary(staging / files.SUMMARY, summary)
        report.write(staging, folder.name)
    return folder
