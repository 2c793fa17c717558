"""Run the whole chain of phoque on a tiny random model of each supported family, and write docs/reference/models.md.

Each model has the real layout of its family, random weights, and the family's chat template where TRL ships one. The
commands are run as a user runs them:

- train: two steps; a second run is stopped after its first step and resumed, and must end with the same adapter, bit
  for bit.
- fast engine: the loss and gradients of a packed row, with fused linear layers, equal transformers' own layers run one
  conversation at a time (tests/models/test_families.py compares them; this table repeats the architecture's record).
- merge: every weight equals that of peft's own merge in bf16.
- ONNX: fp32, q8 and q4, each compared with the checkpoint by export-onnx; the table shows the agreement of fp32.
- Node, browser: verify-onnx loads fp32 and q4 in Transformers.js and compares the logits.
- probes: psm-probe and compare-sae resolve the model (--dry-run).

Run: uv run python benchmarks/families.py [--only FAMILY] [--browser] [--write]
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
WEIGHTS = "adapter_model.safetensors"
PAGE = ROOT / "docs" / "reference" / "models.md"
COLUMNS = ("train", "fast engine", "merge", "ONNX", "Node", "browser", "GGUF", "probes")
TRAIN = (
    "--max-steps 2 --save-steps 1 --batch-size 2 --max-length 512 --quantization fp32 --lora-rank 4 --sample-every 0 "
    "--learning-rate 0.01 --seed 1"
)


INTRODUCTION = """# Models

This table is made by `benchmarks/families.py`, which runs every command on a tiny random model of each family: the
real layout of its layers, and its real chat template where TRL ships one. "yes" means that the command ran and that its
result was compared: a resumed training with an uninterrupted one, a merge with peft's, an export with the checkpoint in
ONNX Runtime, in Transformers.js under Node, and in Chromium, and as GGUF in llama.cpp.

"""
NOTES = """
- **Sliding windows** are respected in training, probes, chats and exports: Mistral v0.1, Ministral, Qwen 2 and 3 where
  the config turns them on, Gemma 3, Phi 3 and OLMo 3. Blocks without rotary embeddings (SmolLM3) and the multipliers of
  Granite are respected, too.
- **Models with a vision tower** (Ministral 3, Mistral Small 3.1, Gemma 3 4B and larger, Qwen 3.5) are trained and
  probed as text models. The adapter has the names of the full model, and a merge keeps the vision tower. The tower is
  exported for the Mistral models only (`--layout multimodal`); the others export as text models.
- **Fast engine** "no" means that training runs the layers of transformers. LFM2 and Qwen 3.5 carry a state from token
  to token, so the conversations of a packed row run one at a time. Their training is slow without the packages
  `causal-conv1d` and `flash-linear-attention`, which transformers uses where they are installed.
- **Mistral 3 with its vision tower** (Ministral-3-3B-Instruct-2512 in FP8) has tests of its own for every column, among
  them both layouts of the export.
- **Mixtures of experts and Mamba layers** are refused (Granite 4 tiny and small).
- Another dense family is one file: see [Adding a family](../design/adding-a-family.md).
"""


@dataclass
class Chain:
    """The commands on one family's model; `cells` holds the result of each column."""

    server: Any
    family: str
    model: Path
    folder: Path
    rows: Path
    cells: dict[str, str] = field(default_factory=dict)

    def phoque(self, *words: Any) -> dict[str, Any]:
        """Run a command with --json; return what it printed. Raises RuntimeError with the error's second line."""
        out, err = self.folder / "out.txt", self.folder / "err.txt"
        arguments = [str(word) for word in words] + ["--json"]
        pid = self.server.start(arguments, dict(os.environ), self.folder, out, err)
        if self.server.poll(pid, True):
            lines = err.read_text().rstrip().splitlines() or ["it printed nothing"]
            raise RuntimeError(lines[-2] if len(lines) > 1 else lines[-1])
        return json.loads(out.read_text())

    def record(self, column: str, run: Callable[[], str]) -> None:
        """Fill in a column; a failure is written into its cell."""
        try:
            self.cells[column] = run()
        except RuntimeError as error:
            self.cells[column] = f"FAIL: {error}"

    def train(self) -> str:
        from tests.forkserver import slowly

        command = ("train", "--base-model", self.model, "--dataset", self.rows, *TRAIN.split())
        self.phoque(*command, "--output-dir", self.folder / "run")
        stopped = self.folder / "stopped"
        arguments = [str(word) for word in (*command, "--output-dir", stopped)]
        outputs = self.folder / "out.txt", self.folder / "err.txt"
        pid = self.server.start(arguments, dict(os.environ), self.folder, *outputs, slowly(2))
        while not (stopped / "checkpoint-1" / "MANIFEST.json").is_file():
            if self.server.poll(pid, False) is not None:
                raise RuntimeError("the run ended before its first checkpoint")
            time.sleep(0.05)
        os.kill(pid, signal.SIGINT)
        self.server.poll(pid, True)
        self.phoque(*command, "--output-dir", stopped)
        first, second = ((self.folder / name / "adapter" / WEIGHTS).read_bytes() for name in ("run", "stopped"))
        if first != second:
            raise RuntimeError("the resumed run ends with another adapter")
        return "yes"

    def merge(self) -> str:
        self.phoque("merge", "--adapter-source", self.folder / "run", "--output-dir", self.folder / "merged")
        if differing := compare_with_peft(self.model, self.folder / "run" / "adapter", self.folder / "merged"):
            raise RuntimeError(f"differs from peft in {differing}")
        return "yes"

    def export(self) -> str:
        done = self.phoque(
            *("export-onnx", "--merged-dir", self.folder / "merged", "--output-dir", self.folder / "onnx"),
            *("--chats", self.rows, "--dtype", "fp32,q8,q4"),
        )
        agreement = {dtype: entry["agreement"] for dtype, entry in done["dtypes"].items()}
        if agreement["fp32"] < 1:
            raise RuntimeError(f"fp32 predicts the same token in {agreement['fp32']:.1%} of places only")
        return "fp32, q8, q4"

    def verify(self, level: str) -> str:
        self.phoque(
            *("verify-onnx", "--local-dir", self.folder / "onnx", "--level", level, "--install"),
            *("--dtype", "fp32,q4"),
        )
        return "yes"

    def gguf(self) -> str:
        """A model as llama.cpp has the family in its code, because the others are refused."""
        from tests.gguf.conftest import build_family

        model = build_family(self.family, self.folder / "gguf-model")
        done = self.phoque(
            *("export-gguf", "--merged-dir", model, "--output-dir", self.folder / "gguf", "--install"),
            *("--chats", self.rows, "--dtype", "f32"),
        )
        if (kl := done["dtypes"]["f32"]["kl"]) > 1e-3:
            raise RuntimeError(f"f32 has a KL divergence of {kl:.2g}")
        return "yes"

    def probes(self) -> str:
        adapter, texts = self.folder / "run", self.folder / "texts.jsonl"
        texts.write_text("".join(json.dumps({"text": f"The harbour has {n} gulls."}) + "\n" for n in range(40)))
        self.phoque(
            *("psm-probe", "--model-source", self.model, "--adapter-source", adapter, "--persona", "seal"),
            *("--steer-blocks", "1", "--dry-run"),
        )
        self.phoque(
            *("compare-sae", "--base-model", self.model, "--updated-adapter", adapter, "--blocks", "1"),
            *("--chat", self.rows, "--text", texts, "--dry-run"),
        )
        return "yes"


def compare_with_peft(base: Path, adapter: Path, merged: Path) -> str:
    """Return the first weight of a merged folder that differs from peft's own merge, or ""."""
    import torch
    import transformers
    from peft import PeftModel
    from safetensors.torch import load_file

    from phoque.models.architectures import architecture_of

    config = transformers.AutoConfig.from_pretrained(base)
    auto_class = getattr(transformers, architecture_of(config).auto_class)
    model = auto_class.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    ours = auto_class.from_pretrained(merged, dtype=torch.float32).state_dict()
    unchanged = load_file(base / "model.safetensors").keys() - load_file(merged / "model.safetensors").keys()
    if unchanged:
        return sorted(unchanged)[0]
    for name, weight in expected.state_dict().items():
        if not torch.allclose(ours[name], weight.to(torch.bfloat16).float(), atol=1e-6, rtol=1e-2):
            return name
    return ""


def run_chain(server: Any, family: str, root: Path, rows: Path, browser: bool) -> dict[str, str]:
    from tests.tiny.families import FAMILIES, build

    from phoque.models.architectures import ARCHITECTURES

    folder = root / family.replace(" ", "-")
    folder.mkdir(parents=True)
    chain = Chain(server, family, build(family, folder / "model"), folder, rows)
    architecture = ARCHITECTURES[FAMILIES[family][0]]
    chain.record("train", chain.train)
    chain.cells["fast engine"] = f"no: {architecture.no_engine}" if architecture.no_engine else "yes"
    chain.record("merge", chain.merge)
    if architecture.no_export:
        reason = architecture.no_export.rstrip(".")
        chain.cells |= {"ONNX": f"no: {reason[0].lower()}{reason[1:]}", "Node": "-", "browser": "-"}
    else:
        chain.record("ONNX", chain.export)
        chain.record("Node", lambda: chain.verify("node"))
        chain.record("browser", (lambda: chain.verify("browser")) if browser else (lambda: "not run"))
    if architecture.no_gguf:
        reason = architecture.no_gguf.rstrip(".")
        chain.cells["GGUF"] = f"no: {reason if reason.startswith('llama.cpp') else reason[0].lower() + reason[1:]}"
    else:
        chain.record("GGUF", chain.gguf)
    chain.record("probes", chain.probes)
    return chain.cells


def render_page(results: dict[str, dict[str, str]]) -> str:
    """Return docs/reference/models.md."""
    from tests.tiny.families import FAMILIES

    lines = [f"| Family | `model_type` | {' | '.join(COLUMNS)} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    for family, cells in results.items():
        row = " | ".join(cells[column] for column in COLUMNS)
        lines.append(f"| {family} | `{FAMILIES[family][0]}` | {row} |")
    return INTRODUCTION + "\n".join(lines) + "\n" + NOTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="run this family alone; several times for more")
    parser.add_argument("--browser", action="store_true", help="also run the exports in headless Chromium")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--output", type=Path, help="write the cells as JSON to this file")
    arguments = parser.parse_args()
    from tests.forkserver import ForkServer
    from tests.rows import row, write_rows
    from tests.tiny.families import FAMILIES

    server = ForkServer()
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(server.stop)
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = write_rows(root / "rows.jsonl", [row(number) for number in range(40)])
        results = {}
        for family in arguments.only or FAMILIES:
            results[family] = run_chain(server, family, root, rows, arguments.browser)
            print(family, json.dumps(results[family]), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1))
    if arguments.write:
        PAGE.write_text(render_page(results))
    if any(cell.startswith("FAIL") for cells in results.values() for cell in cells.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
