"""Build the JSON report of a comparison and the rows of its tables."""

import time
from typing import Any

import numpy
import torch

from phoque.inference.residual_stream import get_blocks
from phoque.models.load import default_device
from phoque.probes import stats
from phoque.probes.persona_source import show_settings
from phoque.probes.sae import baselines, files
from phoque.probes.sae.comparison import ComparisonResult
from phoque.probes.sae.plan import Plan
from phoque.results import library_versions
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.fields import Resolved
from phoque.version import __version__

Rows = list[dict[str, Any]]

LIMITATIONS = [
    "A feature is one direction of one dictionary: another seed gives other features; --seeds measures how many recur.",
    "Shifts are measured on the base model's answers; the columns own_* hold those on the updated model's answers.",
    "A change that no feature represents can only appear among the directions of the difference.",
    "Promoted tokens come from the logit lens, which skips later blocks: in middle blocks they are only a hint.",
]


def build_report(resolved: Resolved[SaeSettings], plan: Plan, measurements: ComparisonResult) -> dict[str, Any]:
    """Build the JSON report of a comparison; its keys are those of schema version `files.SCHEMA`."""
    s, main, audit = resolved.settings, measurements.blocks[0], measurements.inputs
    base, tuned = audit.residuals["base"], audit.residuals["tuned"]
    count = len(get_blocks(audit.variants.model))
    curve = build_layer_rows(measurements, s.seed)
    kl = _compute_kl(measurements)
    tuned_shift = next(r for r in curve if (r["model"], r["text"], r["layer"]) == ("tuned", "response", main.layer))
    return {
        "schema_version": files.SCHEMA,
        "run": {
            "command": "compare-sae",
            "phoque": __version__,
            "seed": s.seed,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "device": _get_device_name(),
            "versions": library_versions("torch", "transformers", "peft", "numpy"),
        },
        "models": {
            "base": {
                "id": plan.source.name,
                "revision": plan.source.revision,
                "origin": plan.source.origin,
                "quantization": s.quantization,
            },
            "tuned": {
                "kind": "merged" if plan.updated else "adapter",
                "id": plan.names["tuned"],
                "revision": plan.updated.revision if plan.updated else None,
            },
            "control": {"kind": "adapter", "id": plan.names["control"], "runs": [plan.names[c] for c in plan.controls]}
            if "control" in plan.names
            else None,
        },
        "config": show_settings(resolved, "base_model", plan.source, plan.tuned),
        "prompts": {
            "n": len(measurements.questions),
            "source": s.prompts_file or plan.persona.name,
            "system": s.system,
            "n_own": len(audit.rows["own"]),
            "n_text": len(audit.rows["text"]),
        },
        "tokens": {"audit": base["response"].left_out, "training": measurements.tokens},
        "layer": {"block_index": main.layer, "of": count, "indexing": "block_output_0based"},
        "sae": _describe_autoencoder(s, plan, measurements)
        | {"quality": main.summary["quality"][0], "quality_of_seeds": main.summary["quality"]},
        "verdicts": main.summary["verdicts"],
        "overall": main.summary["overall"]
        | {"rel_mean_diff_norm": tuned_shift["rel_mean_diff_norm"], "mean_token_kl": float(numpy.nanmean(kl))},
        "nulls": main.summary["nulls"],
        "features": main.summary["features"],
        "causes": main.summary["causes"],
        "difference": main.summary["difference"],
        "more_layers": [{"layer": {"block_index": block.layer}, **block.summary} for block in measurements.blocks[1:]],
        "baselines": {
            "layer_curve": curve,
            "logit_lens": _apply_logit_lens(measurements, count, plan.layers),
            "kl_by_prompt": kl,
            "pca": {
                kind: baselines.run_difference_pca(base[kind], tuned[kind], main.layer, default_device())
                for kind in ("response", "text")
            },
        },
        "scores": _summarize_scores(measurements, s.seed),
        "prompt_shifts": build_prompt_rows(measurements, kl),
        "warnings": measurements.warnings + plan.warnings,
        "limitations": LIMITATIONS,
    }


def build_layer_rows(measurements: ComparisonResult, seed: int) -> Rows:
    """The mean shift of the residual stream: one row per model, set of texts and block."""
    rows = []
    for variant, sets in measurements.inputs.residuals.items():
        for kind, states in sets.items() if variant != "base" else ():
            curve = baselines.measure_layer_shifts(measurements.inputs.residuals["base"][kind], states, seed)
            rows += [
                {
                    "model": variant,
                    "text": kind,
                    "layer": n,
                    "rel_mean_diff_norm": float(curve["rel"][n]),
                    "ci_low": float(curve["low"][n]),
                    "ci_high": float(curve["high"][n]),
                }
                for n in range(len(curve["rel"]))
            ]
    return rows


def build_prompt_rows(measurements: ComparisonResult, kl: list[float]) -> Rows:
    """One row per question, the most shifted first: its shift, scores and every model's answer."""
    main, rows = measurements.blocks[0], []
    null = main.prompt_null.flatten()
    for n, question in enumerate(measurements.questions):
        row: dict[str, Any] = {
            "prompt_id": n,
            "prompt": question,
            "shift": float(main.prompt_shift[n]),
            "null_q": float((null < main.prompt_shift[n]).mean()),
            "kl": kl[n],
        }
        row |= {
            f"{side}_{name}": float(v[n])
            for side, by_side in measurements.values.items()
            for name, v in by_side.items()
        }
        row |= {
            f"{side}_generation": measurements.inputs.tokenizer.decode(by_side[n].ids)
            for side, by_side in measurements.answers.items()
        }
        rows.append(row)
    return sorted(rows, key=lambda row: -row["shift"])


def build_answer_rows(measurements: ComparisonResult) -> Rows:
    """One row per answer, with its scores."""
    return [
        {
            "prompt_id": n,
            "prompt": question,
            "model": side,
            "response": measurements.inputs.tokenizer.decode(replies[n].ids),
            "n_tokens": len(replies[n].ids),
            "finish_reason": replies[n].finish_reason,
            "scores": {name: float(values[n]) for name, values in measurements.values[side].items()},
        }
        for side, replies in measurements.answers.items()
        for n, question in enumerate(measurements.questions)
    ]


def _describe_autoencoder(s: SaeSettings, plan: Plan, measurements: ComparisonResult) -> dict[str, Any]:
    dictionary = measurements.dictionaries[plan.layers[0]][0]
    metadata = dictionary.config.get("metadata") or {}
    return {
        "source": s.sae or "trained by phoque",
        "d_in": dictionary.decoder.shape[1],
        "d_sae": dictionary.features,
        "architecture": metadata.get("training_architecture") or dictionary.config.get("architecture"),
        "saved_as": dictionary.config.get("architecture"),
        "k": None if s.sae else s.k,
        "path": None if s.sae else f"{files.DICTIONARIES}/block-{plan.layers[0]}",
        "hook_name": metadata.get("hook_name") or dictionary.config.get("hook_name"),
        "steps": metadata.get("steps"),
        "texts": measurements.texts.sources,
        "texts_sha256": measurements.texts.sha256,
    }


def _apply_logit_lens(measurements: ComparisonResult, count: int, chosen: list[int]) -> Rows:
    """The tokens that the mean difference on unrelated text promotes and demotes, by logit lens, per block."""
    layers = baselines.choose_lens_layers(count, chosen)
    base, tuned = (measurements.inputs.residuals[side]["text"].means for side in ("base", "tuned"))
    differences = torch.stack([(tuned - base).mean(0)[layer] for layer in layers])
    with measurements.inputs.variants.activate("base") as model:
        tokens = baselines.list_lens_tokens(model, measurements.inputs.tokenizer, differences)
    return [{"layer": layer, **promoted} for layer, promoted in zip(layers, tokens, strict=True)]


def _compute_kl(measurements: ComparisonResult) -> list[float]:
    variants, residuals = measurements.inputs.variants, measurements.inputs.residuals
    # adapters change neither the final norm nor the head, so the base model stands for a model with an adapter
    updated_model = variants.model if variants.updated is None else variants.updated
    base, tuned = residuals["base"]["response"], residuals["tuned"]["response"]
    return baselines.compute_kl((variants.model, base), (updated_model, tuned))


def _summarize_scores(measurements: ComparisonResult, seed: int) -> dict[str, Any]:
    names = [scorer.name for scorer in measurements.scorers]
    base = measurements.values["base"]
    return {
        "scorers": names,
        "means": {
            variant: {n: float(v.mean()) for n, v in by_scorer.items()}
            for variant, by_scorer in measurements.values.items()
        },
        "contrasts": {
            f"{variant}-base": {name: stats.paired_contrast(by_scorer[name], base[name], seed) for name in names}
            for variant, by_scorer in measurements.values.items()
            if variant != "base"
        }
        | (
            {
                "tuned-control": {
                    name: stats.paired_contrast(
                        measurements.values["tuned"][name], measurements.values["control"][name], seed
                    )
                    for name in names
                }
            }
            if "control" in measurements.values
            else {}
        ),
    }


def _get_device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
