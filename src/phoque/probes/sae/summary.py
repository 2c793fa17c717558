"""The JSON report of a comparison, and the rows of its tables."""

import time
from importlib.metadata import version
from typing import Any

import numpy
import torch

from phoque import __version__
from phoque.inference.residual_stream import blocks
from phoque.models.load import device
from phoque.probes import stats
from phoque.probes.sae import baselines, files
from phoque.probes.sae.comparison import Found
from phoque.probes.sae.plan import Plan
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.fields import Resolved

Rows = list[dict[str, Any]]

LIMITATIONS = [
    "A feature is one direction of one dictionary: another seed cuts the same space otherwise; --seeds says how far.",
    "Shifts are measured on the base model's answers; what shows in the updated model's own is in the columns own_*.",
    "What no feature of the dictionary can say is invisible; the drop in explained variance says how much that is.",
    "The tokens that a feature promotes in the middle of a model are read through the last layers: they are a hint.",
]


def summarised(resolved: Resolved[SaeSettings], plan: Plan, found: Found) -> dict[str, Any]:
    """The report; see facts and README for what its keys mean."""
    s, main, audit = resolved.settings, found.blocks[0], found.audit
    base, tuned = audit.heard["base"], audit.heard["tuned"]
    count = len(blocks(audit.sides.model))
    curve = layer_rows(found, s.seed)
    kl = _kl(found)
    moved = next(r for r in curve if (r["model"], r["text"], r["layer"]) == ("tuned", "response", main.layer))
    return {
        "schema_version": files.SCHEMA,
        "run": {
            "command": "compare-sae",
            "phoque": __version__,
            "seed": s.seed,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "device": _device(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "numpy")},
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
            "control": {"kind": "adapter", "id": plan.names["control"]} if "control" in plan.names else None,
        },
        "config": resolved.provenance(),
        "prompts": {
            "n": len(found.questions),
            "source": s.prompts_file or plan.persona.name,
            "system": s.system,
            "n_own": len(audit.rows["own"]),
            "n_text": len(audit.rows["text"]),
        },
        "tokens": {"audit": base["response"].left_out, "training": found.tokens},
        "layer": {"block_index": main.layer, "of": count, "indexing": "block_output_0based"},
        "sae": _about(s, plan, found)
        | {"quality": main.summary["quality"][0], "quality_of_seeds": main.summary["quality"]},
        "overall": main.summary["overall"]
        | {"rel_mean_diff_norm": moved["rel_mean_diff_norm"], "mean_token_kl": float(numpy.nanmean(kl))},
        "nulls": main.summary["nulls"],
        "features": main.summary["features"],
        "causes": main.summary["causes"],
        "more_layers": [{"layer": {"block_index": one.layer}, **one.summary} for one in found.blocks[1:]],
        "baselines": {
            "layer_curve": curve,
            "logit_lens": _lens(found, count, plan.layers),
            "kl_by_prompt": kl,
            "pca": {
                kind: baselines.difference_parts(base[kind], tuned[kind], main.layer, device())
                for kind in ("response", "text")
            },
        },
        "scores": _scores(found, s.seed),
        "prompt_shifts": prompt_rows(found, kl),
        "warnings": found.warnings + plan.warnings,
        "limitations": LIMITATIONS,
    }


def layer_rows(found: Found, seed: int) -> Rows:
    """How far every block moved, a row a side, text and block."""
    rows = []
    for side, sets in found.audit.heard.items():
        for kind, held in sets.items() if side != "base" else ():
            curve = baselines.layer_curve(found.audit.heard["base"][kind], held, seed)
            rows += [
                {
                    "model": side,
                    "text": kind,
                    "layer": n,
                    "rel_mean_diff_norm": float(curve["rel"][n]),
                    "ci_low": float(curve["low"][n]),
                    "ci_high": float(curve["high"][n]),
                }
                for n in range(len(curve["rel"]))
            ]
    return rows


def prompt_rows(found: Found, kl: list[float]) -> Rows:
    """A row a question, the most shifted first: its shift, scores and every model's answer."""
    main, rows = found.blocks[0], []
    null = main.prompt_null.flatten()
    for n, question in enumerate(found.questions):
        row: dict[str, Any] = {
            "prompt_id": n,
            "prompt": question,
            "shift": float(main.prompt_shift[n]),
            "null_q": float((null < main.prompt_shift[n]).mean()),
            "kl": kl[n],
        }
        row |= {f"{side}_{name}": float(v[n]) for side, own in found.values.items() for name, v in own.items()}
        row |= {f"{side}_generation": found.audit.tokenizer.decode(own[n].ids) for side, own in found.said.items()}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["shift"])


def answer_rows(found: Found) -> Rows:
    """A row an answer, with its scores."""
    return [
        {
            "prompt_id": n,
            "prompt": question,
            "model": side,
            "response": found.audit.tokenizer.decode(own[n].ids),
            "n_tokens": len(own[n].ids),
            "finish_reason": own[n].finish_reason,
            "scores": {name: float(values[n]) for name, values in found.values[side].items()},
        }
        for side, own in found.said.items()
        for n, question in enumerate(found.questions)
    ]


def _about(s: SaeSettings, plan: Plan, found: Found) -> dict[str, Any]:
    one = found.dictionaries[plan.layers[0]][0]
    metadata = one.config.get("metadata") or {}
    return {
        "source": s.sae or "trained by phoque",
        "d_in": one.decoder.shape[1],
        "d_sae": one.features,
        "architecture": metadata.get("training_architecture") or one.config.get("architecture"),
        "saved_as": one.config.get("architecture"),
        "k": None if s.sae else s.k,
        "path": None if s.sae else f"{files.DICTIONARIES}/block-{plan.layers[0]}",
        "hook_name": metadata.get("hook_name") or one.config.get("hook_name"),
        "steps": metadata.get("steps"),
        "texts": found.texts.sources,
        "texts_sha256": found.texts.sha256,
    }


def _lens(found: Found, count: int, chosen: list[int]) -> Rows:
    """What the mean difference on unrelated text promotes: what the fine-tune brings to any text."""
    layers = baselines.lens_layers(count, chosen)
    base, tuned = (found.audit.heard[side]["text"].means for side in ("base", "tuned"))
    gaps = torch.stack([(tuned - base).mean(0)[layer] for layer in layers])
    with found.audit.sides.on("base") as model:
        words = baselines.lens(model, found.audit.tokenizer, gaps)
    return [{"layer": layer, **own} for layer, own in zip(layers, words, strict=True)]


def _kl(found: Found) -> list[float]:
    sides, heard = found.audit.sides, found.audit.heard
    second = sides.updated if sides.updated is not None else sides.model  # adapters touch neither norm nor head
    return baselines.divergence((sides.model, heard["base"]["response"]), (second, heard["tuned"]["response"]))


def _scores(found: Found, seed: int) -> dict[str, Any]:
    names = [scorer.name for scorer in found.scorers]
    base = found.values["base"]
    return {
        "scorers": names,
        "means": {side: {n: float(v.mean()) for n, v in own.items()} for side, own in found.values.items()},
        "contrasts": {
            f"{side}-base": {name: stats.contrast(own[name], base[name], seed) for name in names}
            for side, own in found.values.items()
            if side != "base"
        },
    }


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
