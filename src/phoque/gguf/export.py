"""`phoque export-gguf`: find or merge the model, write each precision, measure it in llama.cpp, verify and push."""

import gc
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter

from phoque.checks import Verdict
from phoque.data.chat_template import ChatTemplate
from phoque.errors import RunError
from phoque.files import EXPORT_RECORD, atomic_folder, sha256
from phoque.gguf.adapter import write_lora
from phoque.gguf.importance import measure_importance
from phoque.gguf.llama_cpp import Library, load_library
from phoque.gguf.llama_cpp_model import LlamaCppModel
from phoque.gguf.metadata import file_name, find_format, write_metadata
from phoque.gguf.ollama import QUOTES, find_turn_texts, render_modelfile
from phoque.gguf.tensors import GgufTensors
from phoque.gguf.verify.files import MODELFILE
from phoque.gguf.vocabulary import find_pre_tokenizer, read_vocabulary
from phoque.gguf.writer import write_file
from phoque.hub.repo import Repo
from phoque.hub.store import CARD, Snapshot
from phoque.inference import accuracy
from phoque.merging.find_source import find_source
from phoque.model_cards import render_gguf_card
from phoque.models.adapter_source import find_adapter, find_base, find_run_record, training_system
from phoque.models.checkpoint_reader import CheckpointReader
from phoque.models.config import load_config, load_tokenizer
from phoque.models.load import default_device, load_model
from phoque.models.source import Source
from phoque.models.stop_tokens import list_stop_tokens
from phoque.results import DryRun
from phoque.services import Services
from phoque.settings.export_gguf import GgufSettings
from phoque.settings.fields import Resolved

QUANTIZED = ("q8_0", "q6_k", "q5_k_m", "q4_k_m")
STORED_DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}  # what holds these values exactly; f32 holds any
MAX_TOKENS = 4096  # of the context in which accuracy is measured


@dataclass(frozen=True, kw_only=True)
class GgufResult:
    """An export: its folder, and for each precision its file, its size, and its distance from the checkpoint."""

    output_dir: str
    source: str
    dtypes: dict[str, dict[str, Any]]
    modelfile: str
    seconds: float = 0.0
    bytes: int = 0
    verdict: str = ""
    repo: str | None = None
    commit: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For --json; `repo` and `commit` are left out if nothing was pushed."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def export_gguf(resolved: Resolved[GgufSettings], services: Services, *, dry_run: bool) -> GgufResult | DryRun:
    """Export a model, or an adapter alone, as the settings say; the folder appears when all is written and verified.

    Raises RunError if a file does not verify, unless --no-verify-strict is given.
    """
    s, console = resolved.settings, services.console
    folder = s.folder
    repo = Repo(services.hub, s.push_repo_id) if s.push_repo_id else None
    # before a merge, which takes minutes
    library = None if dry_run else load_library(services, install=s.install)
    adapter = find_adapter(s.adapter_source, s.adapter_revision, services).folder if s.lora else None
    if adapter:
        source = find_base(adapter, s.base, s.revision, services, weights=not dry_run)
        find_format(load_config(source))
    else:
        source = find_source(s, services, find_format, dry_run=dry_run)
    if library is None:
        facts = {"output_dir": str(folder), "source": source.name, "dtypes": dict.fromkeys(s.dtypes)}
        return DryRun(facts, resolved.provenance())
    if repo:
        repo.open(s.access, console.warn)
    started = time.monotonic()
    with atomic_folder(folder) as staging:
        export = _Export(source, adapter, s, services, library, staging)
        dtypes = export.write_adapter(adapter) if adapter else export.write_model()
        modelfile = export.write_modelfile(dtypes)
        result = GgufResult(output_dir=str(folder), source=source.name, dtypes=dtypes, modelfile=modelfile)
        size = sum(report["bytes"] for report in dtypes.values())
        result = replace(result, seconds=round(time.monotonic() - started, 1), bytes=size)
        _write_record(staging, source, result, system=export.system, lora=s.lora)
        if not s.lora:
            result = replace(result, verdict=_verify(staging, source, s, services))
        (staging / CARD).write_text(render_gguf_card(source, result.to_json(), s.push_repo_id, lora=s.lora))
    if repo is None:
        return result
    files = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}

    def find_stale(snapshot: Snapshot) -> list[str]:
        earlier = repo.list_recorded(snapshot)
        return [path for path in snapshot.files if path.endswith(".gguf") and path in earlier and path not in files]

    return replace(result, repo=repo.name, commit=repo.push(files, "GGUF export", find_stale))


class _Export:
    """One export: what every step needs; `adapter` is the folder of one that is exported alone."""

    def __init__(
        self,
        source: Source,
        adapter: Path | None,
        s: GgufSettings,
        services: Services,
        library: Library,
        folder: Path,
    ) -> None:
        self.source, self.s, self.services, self.library, self.folder = source, s, services, library, folder
        self.reader = CheckpointReader(source)
        self.form = find_format(self.reader.config)
        self.tokenizer: Any = load_tokenizer(source, adapter)
        ChatTemplate(self.tokenizer, "template", 1 << 20)  # refuses one in which no answer can be located
        self.stop = list_stop_tokens(self.tokenizer, source.folder)
        self.name = s.source_name
        run = find_run_record(adapter or source.folder)
        self.system = s.system if s.system is not None else training_system(run)

    def write_model(self) -> dict[str, dict[str, Any]]:
        """Write every precision; return its file, size, and with --accuracy its KL and agreement, by precision."""
        console, s = self.services.console, self.s
        vocabulary = read_vocabulary(self.tokenizer, self.reader.text_config.vocab_size, self.stop[0])
        console.stage("finding the pre-tokenizer of llama.cpp that gives the same tokens")
        pre = find_pre_tokenizer(vocabulary, self.tokenizer, self.library, self.folder)
        if pre.splits_marks:
            console.warn(
                "llama.cpp splits words with combining marks (Hindi, Thai, Tamil ...) into other tokens than this "
                "model's tokenizer does: in these scripts its answers may be worse than the original's"
            )
        exact = self._find_exact_dtype()
        quantized = [dtype for dtype in s.dtypes if dtype in QUANTIZED]
        whole = [dtype for dtype in s.dtypes if dtype not in QUANTIZED]
        files = {dtype: self.folder / file_name(self.name, dtype) for dtype in s.dtypes}
        source_file = files.get(exact, self.folder / ".exact.gguf")

        def add_metadata(writer: GGUFWriter, dtype: str) -> None:
            write_metadata(writer, self.reader.config, self.form, name=self.name, dtype=dtype)
            vocabulary.write(writer, pre.name, space_prefix=pre.space_prefix)
            writer.add_chat_template(self.tokenizer.get_chat_template())

        for dtype in whole + ([exact] if quantized and exact not in whole else []):
            tensors = GgufTensors(self.reader, self.form, dtype)
            plan = tensors.plan()
            console.stage(f"writing {len(plan)} tensors in {dtype}")
            with console.progress(len(plan)) as show:
                file = files.get(dtype, source_file)
                write_file(file, self.form.name, lambda w, d=dtype: add_metadata(w, d), plan, tensors.values(), show)
        calibration, held_out = self._load_chats(bool(quantized))
        importance = self._measure_importance(calibration) if quantized and s.importance else {}
        for dtype in quantized:
            console.stage(f"quantizing to {dtype} with llama.cpp")
            self.library.quantize(source_file, files[dtype], dtype, importance)
        if exact not in files:
            source_file.unlink(missing_ok=True)
        reports = {dtype: {"file": file.name, "bytes": file.stat().st_size} for dtype, file in files.items()}
        if s.accuracy:
            self._measure_accuracy(reports, held_out)
        return reports

    def _find_exact_dtype(self) -> str:
        """The precision that holds the weights as they are; FP8 weights times their scales need 32 bits."""
        stored = [self.reader.stored[name] for name in self.reader.text_weights.values()]
        dtypes = {tensor.dtype for tensor in stored if len(tensor.shape) > 1}
        return STORED_DTYPES.get(dtypes.pop(), "f32") if len(dtypes) == 1 else "f32"

    def write_adapter(self, adapter: Path) -> dict[str, dict[str, Any]]:
        """Write the adapter alone in every precision; return its file and size by precision."""
        reports = {}
        for dtype in self.s.dtypes:
            file = self.folder / file_name(f"{self.name}-lora", dtype)
            write_lora(file, self.reader, self.form, adapter, name=self.name, dtype=dtype)
            reports[dtype] = {"file": file.name, "bytes": file.stat().st_size}
        return reports

    def write_modelfile(self, reports: dict[str, dict[str, Any]]) -> str:
        """Write the Modelfile for the smallest file; return its name."""
        file = f"./{min(reports.values(), key=lambda report: report['bytes'])['file']}"
        texts = find_turn_texts(self.tokenizer)
        if texts is None:
            self.services.console.warn("the Modelfile has no TEMPLATE: Ollama's language cannot express this template")
        stop = [self.tokenizer.convert_ids_to_tokens(token) for token in self.stop if token < len(self.tokenizer)]
        if self.system and QUOTES in self.system:
            self.services.console.warn("the Modelfile has no SYSTEM: the system message has triple quotes")
        text = render_modelfile(
            file="./base.gguf" if self.s.lora else file,
            base=self.source.name if self.s.lora else "",
            texts=texts,
            tokenizer=self.tokenizer,
            stop=stop,
            system=self.system,
            adapter=file if self.s.lora else None,
        )
        (self.folder / MODELFILE).write_text(text, encoding="utf-8")
        return MODELFILE

    def _load_chats(self, is_quantized: bool) -> tuple[accuracy.Ids, accuracy.Ids]:
        if not (self.s.accuracy or (is_quantized and self.s.importance)):
            return [], []
        hub, s = self.services.hub, self.s
        return accuracy.load_chats(self.source, s.chats, s.chats_split, hub, config=s.chats_config)

    def _measure_importance(self, calibration: accuracy.Ids) -> dict[str, np.ndarray]:
        tokens = sum(ids.shape[1] for ids in calibration)
        self.services.console.stage(f"measuring which inputs matter, on {tokens} tokens of conversations")
        on = default_device()
        model = load_model(self.source, "fp32" if on.type == "cpu" else "bf16", on=on)
        tensors = GgufTensors(self.reader, self.form, "f16")
        importance = measure_importance(model, calibration, tensors.translate)
        del model
        gc.collect()
        return importance

    def _measure_accuracy(self, reports: dict[str, dict[str, Any]], held_out: accuracy.Ids) -> None:
        tokens = sum(ids.shape[1] for ids in held_out)
        self.services.console.stage(f"comparing with the original model on {tokens} tokens of held-out conversations")
        expected = accuracy.compute_reference(self.source, held_out)
        length = min(MAX_TOKENS, max(ids.shape[1] for ids in held_out) + 8)
        for report in reports.values():
            with LlamaCppModel(self.library, self.folder / report["file"], length) as model:

                def run(ids: np.ndarray, model: LlamaCppModel = model) -> tuple[np.ndarray]:
                    return (model.run(ids[0].tolist(), all_logits=True)[None],)

                report |= accuracy.measure_accuracy(run, held_out, expected)


def _write_record(folder: Path, source: Source, result: GgufResult, *, system: str | None, lora: bool) -> None:
    from phoque.version import __version__

    digests = {file.name: sha256(file) for file in sorted(folder.glob("*.gguf"))}
    record = {
        "schema_version": 1,
        "system": system,
        "phoque": __version__,
        "kind": "lora" if lora else "model",
        "source": source.name,
        "source_revision": source.revision,
        "dtypes": result.dtypes,
        "bytes": result.bytes,
        "sha256": digests,
    }
    (folder / EXPORT_RECORD).write_text(json.dumps(record, indent=1))


def _verify(folder: Path, source: Source, s: GgufSettings, services: Services) -> str:
    from phoque.gguf.verify.run import verify_folder

    verdict: Verdict = verify_folder(folder, source, s.chats, services)
    failures = verdict.failed_checks()
    for check in failures:
        services.console.warn(f"{check.level}: {check.said}")
    if failures and s.verify_strict:
        raise RunError(
            what="The export does not verify; it was deleted.",
            why=f"{failures[0].level}: {failures[0].said}",
            fix="Report it with the model's config.json, or keep the export with --no-verify-strict.",
        )
    return "FAIL" if failures else "PASS"
