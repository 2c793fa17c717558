"""`phoque verify-gguf`: run the levels in order, up to --level or as far as this machine can."""

from pathlib import Path
from typing import Any

from phoque.checks import Verdict, VerifyResult
from phoque.errors import UsageError
from phoque.files import EXPORT_RECORD
from phoque.gguf.llama_cpp import binaries
from phoque.gguf.reader import GgufFile
from phoque.gguf.verify.clients import NEW_TOKENS, check_browser, check_node, prompt_text
from phoque.gguf.verify.files import MODELFILE, check_file, check_folder
from phoque.gguf.verify.llama import Expected, ask_llama, check_llama, read_reference
from phoque.hub.refs import fetch_to_cache
from phoque.hub.repo import Repo
from phoque.models.source import Source, find_model
from phoque.results import DryRun
from phoque.services import Services
from phoque.settings.export_gguf import GGUF_DTYPES
from phoque.settings.fields import Resolved
from phoque.settings.verify_gguf import GGUF_LEVELS, VerifyGgufSettings

CLIENTS = {"node": check_node, "browser": check_browser}


def verify_gguf(resolved: Resolved[VerifyGgufSettings], services: Services, *, dry_run: bool) -> VerifyResult | DryRun:
    """Check GGUF files level by level, up to --level or as far as this machine can."""
    s = resolved.settings
    name, folder, files = find_files(s, services, fetch=not dry_run)
    if dry_run:
        return DryRun({"name": name, "files": [file.name for file in files]}, resolved.provenance())
    reference = find_model(s.reference, None, services) if s.reference else None
    services.console.stage(f"{name}: checking the files")
    verdict = run_levels(folder, files, s, reference, services)
    if s.report_md:
        s.report_md.write_text(verdict.as_markdown(name))
    return VerifyResult(verdict, name, str(folder))


def verify_folder(folder: Path, reference: Source, chats: str, services: Services) -> Verdict:
    """Verify a folder that was just exported, up to llama.cpp."""
    services.console.stage("verifying the files")
    s = VerifyGgufSettings(local_dir=folder, level="llama.cpp", chats=chats)
    return run_levels(folder, sorted(folder.glob("*.gguf")), s, reference, services)


def find_files(s: VerifyGgufSettings, services: Services, *, fetch: bool = True) -> tuple[str, Path, list[Path]]:
    """The name of what is verified, its folder, and its GGUF files; of a repository, only those that are verified.

    Without `fetch` nothing is downloaded. Raises UsageError if there are no files.
    """
    if unknown := [dtype for dtype in s.dtype if dtype.lower() not in GGUF_DTYPES]:
        raise UsageError(
            what=f"There is no precision {unknown[0]!r}.",
            why=f"phoque knows {', '.join(GGUF_DTYPES)}.",
            fix="Fix --dtype.",
        )
    endings = tuple(f"-{dtype.lower()}" for dtype in s.dtype)
    if s.local_dir is None:
        repo = Repo(services.hub, s.repo_id)
        snapshot = repo.snapshot(s.revision)
        folder = services.cache / "gguf" / f"{repo.name.replace('/', '--')}-{snapshot.sha[:12]}"
        files = [folder / path for path in sorted(snapshot.files) if path.endswith(".gguf") and "/" not in path]
        gguf_files = _with_ending(files, endings)
        if fetch:
            names = [EXPORT_RECORD, MODELFILE, *(file.name for file in gguf_files)]
            fetch_to_cache(repo, snapshot, [n for n in names if n in snapshot.files], services.cache, "gguf")
        name = repo.name
    elif s.local_dir.is_file():
        folder, name = s.local_dir.parent, s.local_dir.name
        files = gguf_files = [s.local_dir]
    else:
        folder = s.local_dir
        name, files = folder.name, sorted(folder.glob("*.gguf"))
        gguf_files = _with_ending(files, endings)
    if not gguf_files:
        raise UsageError(
            what=f"There is no GGUF file to verify in {name}.",
            why=f"It has {', '.join(file.name for file in files) or 'none'}.",
            fix="Name a folder or repository with .gguf files, or one such file, as --local-dir or --repo-id.",
        )
    return name, folder, gguf_files


def _with_ending(files: list[Path], endings: tuple[str, ...]) -> list[Path]:
    return [file for file in files if not endings or file.stem.lower().endswith(endings)]


def run_levels(
    folder: Path, files: list[Path], s: VerifyGgufSettings, reference: Source | None, services: Services
) -> Verdict:
    """Run the levels for all files, the most precise first."""
    verdict, console = Verdict(GGUF_LEVELS, s.level), services.console
    last = GGUF_LEVELS.index(s.level or GGUF_LEVELS[-1])
    if s.local_dir is None or s.local_dir.is_dir():
        check_folder(folder, files, all_files=not s.dtype, verdict=verdict)
    read = [file for path in files if (file := check_file(path, verdict, tensors=last >= 1))]
    models = sorted(
        (file for file in read if file.metadata.get("general.type") != "adapter"),
        key=lambda file: GGUF_DTYPES.index(file.precision) if file.precision in GGUF_DTYPES else len(GGUF_DTYPES),
    )
    if last < 2:
        return verdict
    if verdict.failed_checks():
        for level in GGUF_LEVELS[2 : last + 1]:
            verdict.skip(level, "the files run", "a check of an earlier level failed")
        return verdict
    if why := binaries().find_problem(services, install=s.install, node=False):
        for level in GGUF_LEVELS[2 : last + 1]:
            verdict.skip(level, "the files run", why)
        return verdict
    modules = binaries().modules(services.cache)
    if reference:
        console.stage("running the original model")
    expected: Expected | None = read_reference(reference, s.chats, services.hub) if reference else None
    for file in models:
        console.stage(f"running {file.path.name} in llama.cpp")
        expected = check_llama(file, modules, expected, verdict)
    if verdict.failed_checks():
        return verdict
    clients = [check for level, check in CLIENTS.items() if last >= GGUF_LEVELS.index(level)]
    answers = [_ask_for_clients(file, modules) for file in models] if clients else []
    for check in clients:
        for file, answer in zip(models, answers, strict=False):
            check(file, answer, s, services, verdict)
    return verdict


def _ask_for_clients(file: GgufFile, modules: Path) -> dict[str, Any]:
    """What llama.cpp itself answers to the conversation that the clients are given."""
    text = prompt_text(file)
    answer, _ = ask_llama(file.path, modules, prompts=[text], tokens=NEW_TOKENS)
    return {"text": text, "prompt": answer["prompts"][0], "answer": answer["answers"][0], "said": answer["said"][0]}
