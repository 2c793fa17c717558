"""The engine `optimum`: optimum-onnx in an interpreter of its own, since it cannot share ours; for cross-checks.

optimum-onnx 0.1 needs transformers below 4.58, which reads a checkpoint of transformers 5 wrongly and says nothing:
rope_parameters is ignored, and a tokenizer of class TokenizersBackend is left out (facts/onnx.md, section 1). So the
configuration is repaired first, and a model that it cannot know is refused.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from phoque.console import Console
from phoque.errors import FAILED, PhoqueError
from phoque.models.source import Source
from phoque.onnx.graph.decoder import forget

KNOWN = ("llama", "mistral", "qwen2", "qwen3")  # of those that phoque trains
REQUIREMENTS = ("optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.6")
RUN = """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task="text-generation-with-past", dtype="fp32", do_validation=False)
"""


def optimum_graphs(
    source: Source, folder: Path, layout: str, dtypes: list[str], python: Path | None, console: Console
) -> dict[str, int]:
    """Write onnx/model.onnx and its data by optimum-onnx; return its chunks.

    Raises PhoqueError (2) for what that engine would get wrong, (1) if it fails.
    """
    config = json.loads((source.folder / "config.json").read_text())
    _refuse(config, layout, dtypes)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        repaired, made = Path(scratch) / "model", Path(scratch) / "made"
        _repair(source.folder, repaired, config)
        console.say("optimum-onnx exports in an interpreter of its own; the first time uv makes one")
        ran = subprocess.run(
            [*_interpreter(python), "-c", RUN, str(repaired), str(made)], capture_output=True, text=True
        )
        if ran.returncode or not (made / "model.onnx").is_file():
            raise PhoqueError(
                "optimum-onnx failed.",
                (ran.stderr.strip().splitlines() or ["it says no more"])[-1][:300],
                "Use --engine transformers, or check --onnx-export-python.",
                FAILED,
            )
        model = ir.load(made / "model.onnx")
        _as_laid_out(model, config)
        ir.save(model, folder / "onnx" / "model.onnx", external_data="model.onnx_data")
    return {"model.onnx": 1}


def _refuse(config: dict[str, Any], layout: str, dtypes: list[str]) -> None:
    kind, rope = config["model_type"], config.get("rope_parameters") or {}
    why = None
    if kind not in KNOWN or layout != "text":
        why = f"it cannot know {kind}: transformers 4.57 has no such model, and taking it for another loses its scaling"
    elif rope.get("rope_type", "default") != "default":
        why = f"it would lose the rotary scaling {rope['rope_type']!r}"
    elif dtypes != ["fp32"]:
        why = "it serves as the cross-check, in fp32 alone"
    if why:
        raise PhoqueError(
            "The engine optimum would not export this model.",
            f"{why[0].upper()}{why[1:]}.",
            "Use --engine transformers" + ("." if "fp32" not in why else ", or --dtype fp32."),
        )


def _repair(source: Path, into: Path, config: dict[str, Any]) -> None:
    """The model as transformers 4.57 reads it."""
    into.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.name not in ("config.json", "tokenizer_config.json"):
            (into / file.name).symlink_to(file.resolve())
    rope = config.get("rope_parameters") or {}
    dtype = config.get("dtype", config.get("torch_dtype", "float32"))
    repaired = config | {"rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)), "torch_dtype": dtype}
    (into / "config.json").write_text(json.dumps(repaired))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (into / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def _interpreter(python: Path | None) -> list[str]:
    if python:
        return [str(python)]
    uv = shutil.which("uv")
    if uv is None:
        raise PhoqueError(
            "There is no interpreter for optimum-onnx.",
            "uv, which would make one, is not on PATH.",
            "Install uv, or name an interpreter that has optimum-onnx with --onnx-export-python.",
        )
    same = f"torch=={version('torch').split('+')[0]}"  # which uv has in its cache already
    wanted = [word for requirement in (*REQUIREMENTS, same) for word in ("--with", requirement)]
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    return [uv, "run", "--isolated", "--no-project", "--quiet", "--python", ours, *wanted, "python"]


def _as_laid_out(model: ir.Model, config: dict[str, Any]) -> None:
    """The sizes of an empty cache as numbers; optimum's names are Transformers.js's already."""
    heads = config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if str(value.name).startswith(("past_key_values.", "present.")):
            length = "past_sequence_length" if str(value.name).startswith("past") else "total_sequence_length"
            value.shape = ir.Shape(["batch_size", heads, length, head_dim])
    forget(model)
