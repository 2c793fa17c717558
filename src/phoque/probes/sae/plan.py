"""Resolve and check every input of a comparison before a model is loaded."""

from dataclasses import dataclass
from pathlib import Path

from phoque.console import Console
from phoque.data.rows import Dataset, open_dataset
from phoque.errors import PhoqueError
from phoque.hub.client import Hub
from phoque.hub.repo import Repo
from phoque.merging.run import find_adapter
from phoque.models.load import load_config
from phoque.models.source import Source, resolve
from phoque.probes.persona import Persona, load_persona
from phoque.probes.persona_source import fetch_if_remote, find_persona
from phoque.probes.sae.corpus import parse_split
from phoque.probes.sae.dictionary import CONFIG, WEIGHTS, Dictionary, read_dictionary
from phoque.probes.sae.prompts import find_questions
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.fields import Resolved

NEEDS_PERSONA = ("contrast", "lexicon", "logprob")


@dataclass
class Plan:
    """The resolved inputs of a comparison. `dictionary` is the autoencoder of --sae, None if one is trained."""

    source: Source
    updated: Source | None
    adapters: dict[str, Path]
    names: dict[str, str]
    persona: Persona
    questions: list[str]
    layers: list[int]
    dictionary: Dictionary | None
    chats: list[Dataset]
    scorers: list[str]
    warnings: list[str]
    hub: Hub


def make_plan(resolved: Resolved[SaeSettings], cache: Path, console: Console, fetch_weights: bool) -> Plan:
    """Resolve every input that the settings name. Raises PhoqueError (2) for one that is missing or does not fit."""
    s, token = resolved.settings, resolved.secrets.hub
    hub = Hub(token, console.say, s.hub_patience)
    if not s.base_model:
        raise PhoqueError("No base model.", "--base-model is empty.", "Give --base-model or a --preset.")
    chats = _open_chats(s, token)
    persona, warnings, has_persona = load_persona("seal"), [], bool(s.persona or s.dataset)
    if has_persona:
        persona, warnings = find_persona(s, token, cache, hub)
    scorers = [spec for spec in dict.fromkeys(s.scorer) if has_persona or spec not in NEEDS_PERSONA] or ["nll"]
    if not has_persona:
        warnings.append("neither --persona nor --dataset is given: answers are scored with " + ", ".join(scorers))
    questions, notes = find_questions(fetch_if_remote(s.prompts_file, "--prompts-file", cache, hub), persona)
    source = resolve(s.base_model, s.revision, token, cache, console.say, fetch_weights)
    updated = (
        resolve(s.updated_model, s.updated_revision, token, cache, console.say, fetch_weights)
        if s.updated_model
        else None
    )
    adapters, names = {}, {"tuned": f"{updated.name} ({updated.origin})" if updated else ""}
    for side, name, revision in (
        ("control", s.control_adapter, None),
        ("tuned", s.updated_adapter, s.updated_revision),
    ):
        if name:
            adapters[side], commit = find_adapter(name, revision, hub, cache)
            names[side] = name + commit
    config = load_config(source).get_text_config()
    dictionary = _load_autoencoder(s, hub, cache, config.hidden_size) if s.sae else None
    layers = _choose_blocks(s, dictionary, config.num_hidden_layers)
    # an autoencoder that was trained on a local model names it by its folder
    if (
        dictionary is not None
        and dictionary.model_name()
        and dictionary.model_name() not in (source.hub_id, Path(source.name).name)
    ):
        warnings.append(f"the autoencoder says that it was made for {dictionary.model_name()}, not for {source.name}")
    return Plan(
        source, updated, adapters, names, persona, questions, layers, dictionary, chats, scorers, warnings + notes, hub
    )


def _load_autoencoder(s: SaeSettings, hub: Hub, cache: Path, hidden: int) -> Dictionary:
    """Load the autoencoder that --sae names. Raises PhoqueError (2) if it is missing or does not fit the model."""
    folder = Path(s.sae).expanduser()
    name, _, subfolder = s.sae.partition("#")
    if not folder.is_dir() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        repo = Repo(hub, name)
        commit = repo.snapshot()
        for file in (CONFIG, WEIGHTS):
            path = f"{subfolder.strip('/')}/{file}".lstrip("/")
            if path not in commit.files:
                raise PhoqueError(
                    f"There is no {path} in {name}.",
                    "--sae points to it.",
                    "Give the folder after a #: OWNER/NAME#FOLDER.",
                )
            local_path = repo.fetch(commit, path, cache / "saes" / f"{name.replace('/', '--')}-{commit.sha[:12]}")
            folder = local_path.parent
    dictionary = read_dictionary(folder)
    if dictionary.decoder.shape[1] != hidden:
        raise PhoqueError(
            "The autoencoder does not fit the model.",
            f"Its input has {dictionary.decoder.shape[1]} dimensions; the model's residual stream has {hidden}.",
            "Use an autoencoder that was trained on this model.",
        )
    return dictionary


def _choose_blocks(s: SaeSettings, dictionary: Dictionary | None, count: int) -> list[int]:
    trained_block = dictionary.block_index() if dictionary else None
    chosen = s.blocks(count) if s.layers or trained_block is None else [trained_block]
    if dictionary is not None and trained_block is not None and chosen != [trained_block]:
        raise PhoqueError(
            f"The autoencoder was trained on block {trained_block}.", f"--layers asks for {s.layers}.", "Omit --layers."
        )
    if dictionary is not None and trained_block is None and not s.layers:
        raise PhoqueError(
            "It is unknown which block the autoencoder was trained on.",
            "Its cfg.json names no hook that phoque recognizes.",
            "Give the block with --layers; blocks count from 0.",
        )
    if out_of_range := [layer for layer in chosen if not 0 <= layer < count]:
        raise PhoqueError(
            f"There is no block {out_of_range[0]}.",
            f"The model has {count} blocks, which count from 0.",
            "Check --layers.",
        )
    return chosen


def _open_chats(s: SaeSettings, token: str | None) -> list[Dataset]:
    """Open the conversations of --chat and of --dataset; the latter so that the persona's words get features, too."""
    chat, split = parse_split(s.chat)
    sources = {chat: (split, None), s.dataset: (s.split, s.dataset_revision)}
    datasets = [
        open_dataset(name, dataset_split, revision, token)
        for name, (dataset_split, revision) in sources.items()
        if name
    ]
    if not datasets:
        raise PhoqueError(
            "No conversations to train the autoencoder on.",
            "Neither --chat nor --dataset is given.",
            "Give a dataset of chats with --chat.",
        )
    return datasets
