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
from phoque.probes.persona_vectors.evidence import PersonaVectors
from phoque.probes.persona_vectors.steering import AnswerRow, SteeringSetting

LAYERS, ANSWERS, SUMMARY = "activation_by_layer.csv", "generation_results.csv", "summary.json"
PERSONA = "persona.toml"
VECTORS, SAFETENSORS, CONTROL_VECTOR = "persona_vectors.pt", "persona_vectors.safetensors", "control_vector.gguf"
SCHEMA = 1


def write_layers(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the evidence table: a row per block and extraction."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as f:
        csv_writer = csv.DictWriter(f, columns, restval="")
        csv_writer.writeheader()
        csv_writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def write_answers(path: Path, rows: Sequence[AnswerRow], seed: int) -> None:
    """Write the test answers: a row per answer with its measurements."""
    with path.open("w", newline="", encoding="utf-8") as f:
        columns = [
            "prompt_id",
            "prompt",
            "condition",
            "layer",
            "coeff_rel_resid",
            "seed",
            "sample_idx",
            "response",
            "finish_reason",
            *rows[0].measurements,
        ]
        csv_writer = csv.writer(f)
        csv_writer.writerow(columns)
        for r in rows:
            position = (r.setting.layer, r.setting.coefficient) if r.setting else ("", "")
            sample = "greedy" if r.sample is None else r.sample
            values = [f"{v:.6g}" for v in r.measurements.values()]
            csv_writer.writerow(
                [r.question, r.prompt, r.condition, *position, seed, sample, r.text, r.reply.finish_reason, *values]
            )


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write the summary as JSON; a number that is not finite becomes null."""
    path.write_text(json.dumps(to_jsonable(summary), indent=1, ensure_ascii=False), encoding="utf-8")


def write_vectors(folder: Path, vectors: PersonaVectors, setting: SteeringSetting, metadata: dict[str, str]) -> bool:
    """Write the vectors for torch.load (weights_only), as safetensors, and as a control vector for llama.cpp.

    The control vector is the one that was tested: that of the selected block, scaled by the selected coefficient, so
    that a scale of 1 in llama.cpp steers as in the report. Returns whether it was written: llama.cpp cannot steer block
    0.
    """
    raw = {extraction: torch.tensor(v, dtype=torch.float32) for extraction, v in vectors.raw.items()}
    unit = torch.tensor(vectors.unit_vectors(), dtype=torch.float32)
    norm = torch.tensor(vectors.norm, dtype=torch.float32)
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
        "selected_layer": setting.layer,
        "recommended_coeff": setting.coefficient,
        "hidden_size": unit.shape[1],
        **metadata,
    }
    torch.save(tensors | facts, folder / VECTORS)
    save_file(
        {k: t.contiguous() for k, t in tensors.items()}, folder / SAFETENSORS, {k: str(v) for k, v in facts.items()}
    )
    if setting.layer == 0:
        return False
    from gguf import GGUFWriter

    writer = GGUFWriter(folder / CONTROL_VECTOR, "controlvector")
    writer.add_string("controlvector.model_hint", metadata["model_type"])
    writer.add_uint32("controlvector.layer_count", len(unit))
    scaled = setting.coefficient * float(norm[setting.layer]) * unit[setting.layer]
    writer.add_tensor(f"direction.{setting.layer}", scaled.numpy().astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return True
