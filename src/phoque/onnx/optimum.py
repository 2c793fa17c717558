"""`--engine optimum`: export with optimum-onnx in a separate Python environment, as a cross-check in fp32.

optimum-onnx 0.1 needs transformers below 4.58, which misreads a checkpoint of transformers 5 without an error: it
ignores rope_parameters, and skips a tokenizer of class TokenizersBackend. So the configuration is first converted to
what transformers 4.57 reads, and a model type that it does not support is an error.
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
from phoque.errors import RunError, UsageError
from phoque.models.architectures import ARCHITECTURES
from phoque.models.source import Source
from phoque.onnx.graph.nodes import strip_metadata
from phoque.settings.environment import environment_without_secrets

REQUIREMENTS = ("optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.6")
EXPORT_SCRIPT = """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task="text-generation-with-past", dtype="fp32", do_validation=False)
"""


def export_with_optimum(
    source: Source, folder: Path, layout: str, *, dtypes: list[str], python: Path | None, console: Console
) -> dict[str, int]:
    """Write onnx/model.onnx and its external data with optimum-onnx; return the number of data files per .onnx file.

    Raises UsageError for a model that optimum-onnx would export wrongly, (1) if optimum-onnx fails.
    """
    config = json.loads((source.folder / "config.json").read_text())
    _check_supported(config, layout, dtypes)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        input_dir, output_dir = Path(scratch) / "model", Path(scratch) / "made"
        _write_compatible_model(source.folder, input_dir, config)
        console.stage("exporting with optimum-onnx in a separate Python environment, which uv creates the first time")
        process = subprocess.run(
            [*_interpreter_command(python), "-c", EXPORT_SCRIPT, str(input_dir), str(output_dir)],
            capture_output=True,
            text=True,
            env=environment_without_secrets(),
        )
        if process.returncode or not (output_dir / "model.onnx").is_file():
            raise RunError(
                what="optimum-onnx failed.",
                why=(process.stderr.strip().splitlines() or ["It printed no error."])[-1][:300],
                fix="Use --engine transformers, or check --onnx-export-python.",
            )
        model = ir.load(output_dir / "model.onnx")
        _set_cache_shapes(model, config)
        ir.save(model, folder / "onnx" / "model.onnx", external_data="model.onnx_data")
    return {"model.onnx": 1}


def find_limit(config: dict[str, Any], layout: str, dtypes: list[str]) -> str:
    """Why optimum-onnx cannot do an export, given config.json as a dictionary; empty if it can."""
    model_type, rope = config["model_type"], config.get("rope_parameters") or {}
    supported = [name for name, architecture in ARCHITECTURES.items() if architecture.in_optimum]
    if model_type not in supported or layout != "text":
        return f"it does not support {model_type} with layout {layout}: it knows the text models {', '.join(supported)}"
    if rope.get("rope_type", "default") != "default":
        return f"it would ignore the rotary scaling {rope['rope_type']!r}"
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        return f"it would ignore the sliding window of {config['sliding_window']} tokens"
    return "" if dtypes == ["fp32"] else "it is a cross-check and exports fp32 only"


def _check_supported(config: dict[str, Any], layout: str, dtypes: list[str]) -> None:
    if reason := find_limit(config, layout, dtypes):
        raise UsageError(
            what="The engine optimum cannot do this export.",
            why=f"{reason[0].upper()}{reason[1:]}.",
            fix="Use --engine transformers" + ("." if "fp32" not in reason else ", or --dtype fp32."),
        )


def _write_compatible_model(source: Path, folder: Path, config: dict[str, Any]) -> None:
    """Write the model so that transformers 4.57 reads it correctly: links to the files, and two converted configs."""
    folder.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.name not in ("config.json", "tokenizer_config.json"):
            (folder / file.name).symlink_to(file.resolve())
    rope = config.get("rope_parameters") or {}
    dtype = config.get("dtype", config.get("torch_dtype", "float32"))
    compatible_config = config | {
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        "torch_dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(compatible_config))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def _interpreter_command(python: Path | None) -> list[str]:
    if python:
        return [str(python)]
    uv = shutil.which("uv")
    if uv is None:
        raise UsageError(
            what="There is no Python environment with optimum-onnx.",
            why="phoque creates one with uv, and uv is not on PATH.",
            fix="Install uv, or name an interpreter that has optimum-onnx with --onnx-export-python.",
        )
    same_torch = f"torch=={version('torch').split('+')[0]}"  # likely in the cache of uv
    with_options = [word for requirement in (*REQUIREMENTS, same_torch) for word in ("--with", requirement)]
    python_version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return [uv, "run", "--isolated", "--no-project", "--quiet", "--python", python_version, *with_options, "python"]


def _set_cache_shapes(model: ir.Model, config: dict[str, Any]) -> None:
    """Set the static sizes of the cache inputs and outputs; their names are Transformers.js's already."""
    heads = config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if str(value.name).startswith(("past_key_values.", "present.")):
            length = "past_sequence_length" if str(value.name).startswith("past") else "total_sequence_length"
            value.shape = ir.Shape(["batch_size", heads, length, head_dim])
    strip_metadata(model)
