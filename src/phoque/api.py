"""The commands as functions: settings in, a result out. The command line uses these too.

Every function takes the command's settings model, or `Resolved` settings that also say where each value came from, and
a console that shows progress on stderr. With `dry_run=True` it returns a DryRun: what would happen, checked as far as
it can be. Errors are PhoqueError: UsageError for wrong settings, RunError for a failure, Resumable for a stop.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from phoque.console import Console
from phoque.console import console as stderr_console
from phoque.distributed.launch import Launch, enter_launch
from phoque.errors import UsageError
from phoque.inputs import check_inputs
from phoque.results import DryRun
from phoque.services import Services
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.fields import CommandSettings, Resolved
from phoque.settings.presets import PRESETS, SAE_PRESETS
from phoque.settings.resolve import resolved_from
from phoque.training.run_files import check_own_folder

if TYPE_CHECKING:
    from phoque.chat.run import ChatResult
    from phoque.checks import VerifyResult
    from phoque.gguf.export import GgufResult
    from phoque.merging.run import MergeResult
    from phoque.onnx.export import ExportResult
    from phoque.probes.persona_vectors.run import ProbeRunResult
    from phoque.probes.sae.run import CompareResult
    from phoque.settings.chat import ChatSettings
    from phoque.settings.compare_sae import SaeSettings
    from phoque.settings.export_gguf import GgufSettings
    from phoque.settings.export_onnx import ExportSettings
    from phoque.settings.merge import MergeSettings
    from phoque.settings.psm_probe import PsmSettings
    from phoque.settings.train import TrainSettings
    from phoque.settings.verify_gguf import VerifyGgufSettings
    from phoque.settings.verify_onnx import VerifySettings
    from phoque.training.finish import TrainResult

S = TypeVar("S", bound=CommandSettings)
P = ParamSpec("P")
R = TypeVar("R")


def _ends_its_stage(function: Callable[P, R]) -> Callable[P, R]:
    """Let no stage that the function began be shown after it, also if it raises."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        finally:
            console: Any = kwargs.get("console", stderr_console)
            console.end_stage()

    return run


@_ends_its_stage
def train(
    settings: "TrainSettings | Resolved[TrainSettings]", *, dry_run: bool = False, console: Console = stderr_console
) -> "TrainResult | DryRun | None":
    """Fine-tune a chat model into a persona; continues from the newest checkpoint of the same run.

    The commands of `then` and the processes of `gpus` are run by the command line, not here. Under a launcher, such as
    torchrun, every process calls this, and all but process 0 get None.
    """
    launch = enter_launch(console)
    resolved, services = _prepare(settings, console)
    check_own_folder(resolved.settings.folder)
    if dry_run:
        from phoque.training.dry_run import plan_run

        return plan_run(resolved, services)
    from phoque.distributed.processes import take_part
    from phoque.settings.environment import deadline, submission
    from phoque.training.run import train

    with take_part(launch):
        return train(resolved, services, deadline=deadline(resolved.settings.seconds), submission=submission())


@_ends_its_stage
def merge(
    settings: "MergeSettings | Resolved[MergeSettings]", *, dry_run: bool = False, console: Console = stderr_console
) -> "MergeResult | DryRun":
    """Merge an adapter into its base model and verify the result."""
    resolved, services = _prepare(settings, console)
    from phoque.merging.run import merge

    return merge(resolved, services, dry_run=dry_run)


@_ends_its_stage
def chat(
    settings: "ChatSettings | Resolved[ChatSettings]", *, dry_run: bool = False, console: Console = stderr_console
) -> "ChatResult | DryRun":
    """Answer the prompts of the settings, each in a conversation of its own."""
    resolved, services = _prepare(settings, console)
    from phoque.chat.run import answer_prompts

    return answer_prompts(resolved, services, dry_run=dry_run)


@_ends_its_stage
def export_onnx(
    settings: "ExportSettings | Resolved[ExportSettings]", *, dry_run: bool = False, console: Console = stderr_console
) -> "ExportResult | DryRun":
    """Export a model for Transformers.js, measure its precisions and verify it."""
    resolved, services = _prepare(settings, console)
    from phoque.onnx.export import export_model

    return export_model(resolved, services, dry_run=dry_run)


@_ends_its_stage
def verify_onnx(
    settings: "VerifySettings | Resolved[VerifySettings]", *, dry_run: bool = False, console: Console = stderr_console
) -> "VerifyResult | DryRun":
    """Check whether an export runs in Transformers.js."""
    resolved, services = _prepare(settings, console)
    from phoque.onnx.verify.run import verify_export

    return verify_export(resolved, services, dry_run=dry_run)


@_ends_its_stage
def export_gguf(
    settings: "GgufSettings | Resolved[GgufSettings]", *, dry_run: bool = False, console: Console = stderr_console
) -> "GgufResult | DryRun":
    """Export a model, or an adapter alone, for llama.cpp, measure its precisions and verify it."""
    resolved, services = _prepare(settings, console)
    from phoque.gguf.export import export_gguf

    return export_gguf(resolved, services, dry_run=dry_run)


@_ends_its_stage
def verify_gguf(
    settings: "VerifyGgufSettings | Resolved[VerifyGgufSettings]",
    *,
    dry_run: bool = False,
    console: Console = stderr_console,
) -> "VerifyResult | DryRun":
    """Check whether GGUF files run in llama.cpp, and compute what the original model computes."""
    resolved, services = _prepare(settings, console)
    from phoque.gguf.verify.run import verify_gguf

    return verify_gguf(resolved, services, dry_run=dry_run)


@_ends_its_stage
def psm_probe(
    settings: "PsmSettings | Resolved[PsmSettings]",
    *,
    dry_run: bool = False,
    console: Console = stderr_console,
    launch: Launch | None = None,
) -> "ProbeRunResult | DryRun | None":
    """Find a persona's direction in a model, test it against controls, and ask whether a fine-tune moved along it.

    Several processes probe together if each passes its `launch`, from `distributed.launch.claim_gpu()`; all but process
    0 get None. The setting `gpus` is for the command line, which starts them.
    """
    resolved, services = _prepare(settings, console)
    from phoque.distributed.processes import take_part
    from phoque.probes.persona_vectors.run import run_probe

    with take_part(None if dry_run else launch):
        return run_probe(resolved, services, dry_run=dry_run)


@_ends_its_stage
def compare_sae(
    settings: "SaeSettings | Resolved[SaeSettings]",
    *,
    dry_run: bool = False,
    console: Console = stderr_console,
    launch: Launch | None = None,
) -> "CompareResult | DryRun | None":
    """Show which features of a sparse autoencoder a fine-tune moved, beyond chance and beyond a control.

    Several processes compare together if each passes its `launch`; see `psm_probe`.
    """
    resolved, services = _prepare(settings, console)
    from phoque.distributed.processes import take_part
    from phoque.probes.sae.run import compare_models

    with take_part(None if dry_run else launch):
        return compare_models(resolved, services, dry_run=dry_run)


def _prepare(settings: S | Resolved[S], console: Console) -> tuple[Resolved[S], Services]:
    presets = SAE_PRESETS if isinstance(settings, SaeSettings) else PRESETS
    resolved: Any = settings if isinstance(settings, Resolved) else resolved_from(settings, presets)
    if getattr(resolved.settings, "on", None):
        raise UsageError(
            what="A Job is submitted by the command line only.",
            why="`on` is set, and a function runs on this machine.",
            fix="Leave `on` out, or run `phoque COMMAND --on FLAVOR`.",
        )
    check_inputs(resolved.settings)
    if "torch" not in sys.modules:
        console.stage("importing torch and transformers")
    return resolved, Services.create(resolved, console)
