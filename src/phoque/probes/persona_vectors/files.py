"""The files of a run: two tables, a summary, and the vectors in three formats."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file

from phoque.files import to_jsonable
from phoque.probes.persona_vectors.evidence import Vectors
from phoque.probes.persona_vectors.steering import Row, Setting

LAYERS, ANSWERS, SUMMARY = "activation_by_layer.csv", "generation_results.csv", "summary.json"
VECTORS, TENSORS, CONTROL = "persona_vectors.pt", "persona_vectors.safetensors", "control_vector.gguf"
SCHEMA = 1


def write_layers(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A row a block and way of extraction."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, names, restval="")
        table.writeheader()
        table.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def write_answers(path: Path, rows: Sequence[Row], seed: int) -> None:
    """A row an answer, with everything that was measured of it."""
    with path.open("w", newline="", encoding="utf-8") as f:
        head = [
            "prompt_id",
            "prompt",
            "condition",
            "layer",
            "coeff_rel_resid",
            "seed",
            "sample_idx",
            "response",
            "finish_reason",
            *rows[0].measured,
        ]
        table = csv.writer(f)
        table.writerow(head)
        for r in rows:
            where = (r.setting.layer, r.setting.coefficient) if r.setting else ("", "")
            sample = "greedy" if r.sample is None else r.sample
            values = [f"{v:.6g}" for v in r.measured.values()]
            table.writerow(
                [r.question, r.prompt, r.condition, *where, seed, sample, r.text, r.reply.finish_reason, *values]
            )


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """What the run found, as JSON; a number that is none is null."""
    path.write_text(json.dumps(to_jsonable(summary), indent=1, ensure_ascii=False), encoding="utf-8")


def write_vectors(folder: Path, found: Vectors, chosen: Setting, about: dict[str, str]) -> bool:
    """The vectors for torch (weights_only), as safetensors, and as a control vector for llama.cpp.

    The control vector is what was tested: the chosen block's, at its length, so that llama.cpp's scale of 1 steers as
    the report shows. Returns whether it could be written: llama.cpp has no place for block 0.
    """
    raw = {way: torch.tensor(v, dtype=torch.float32) for way, v in found.raw.items()}
    unit = torch.tensor(found.unit(), dtype=torch.float32)
    norm = torch.tensor(found.norm, dtype=torch.float32)
    tensors = {
        "persona_vectors": raw["response_avg"],
        "persona_vectors_prompt_last": raw["prompt_last"],
        "unit_vectors": unit,
        "resid_norm": norm,
    }
    facts = {
        "schema_version": SCHEMA,
        "layer_indexing": "block_output_0based",
        "extraction": "response_avg",
        "selected_layer": chosen.layer,
        "recommended_coeff": chosen.coefficient,
        "hidden_size": unit.shape[1],
        **about,
    }
    torch.save(tensors | facts, folder / VECTORS)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / TENSORS, {k: str(v) for k, v in facts.items()})
    if chosen.layer == 0:
        return False
    from gguf import GGUFWriter

    writer = GGUFWriter(folder / CONTROL, "controlvector")
    writer.add_string("controlvector.model_hint", about["model_type"])
    writer.add_uint32("controlvector.layer_count", len(unit))
    added = chosen.coefficient * float(norm[chosen.layer]) * unit[chosen.layer]
    writer.add_tensor(f"direction.{chosen.layer}", added.numpy().astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return True
