"""What a comparison needs to know before a model is loaded: where everything is, and whether it fits."""

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
from phoque.probes.persona import Persona, read_persona
from phoque.probes.persona_source import brought, find_persona
from phoque.probes.sae.corpus import named_split
from phoque.probes.sae.dictionary import CONFIG, WEIGHTS, Dictionary, read_dictionary
from phoque.probes.sae.prompts import find_questions
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.fields import Resolved

NEEDS_PERSONA = ("contrast", "lexicon", "logprob")


@dataclass
class Plan:
    """Everything that is known before a model is loaded."""

    source: Source
    updated: Source | None
    adapters: dict[str, Path]
    names: dict[str, str]
    persona: Persona
    questions: list[str]
    layers: list[int]
    given: Dictionary | None
    chats: list[Dataset]
    scorers: list[str]
    warnings: list[str]
    hub: Hub


def planned(resolved: Resolved[SaeSettings], cache: Path, console: Console, weights: bool) -> Plan:
    """Find everything that the settings name. Raises PhoqueError (2) for what is not there or does not fit."""
    s, token = resolved.settings, resolved.secrets.hub
    hub = Hub(token, console.say, s.hub_patience)
    if not s.base_model:
        raise PhoqueError("No base model.", "--base-model is empty.", "Name one, or use a --preset.")
    chats = _chats(s, token)
    persona, warnings, known = read_persona("seal"), [], bool(s.persona or s.dataset)
    if known:
        persona, warnings = find_persona(s, token, cache, hub)
    wanted = [spec for spec in dict.fromkeys(s.scorer) if known or spec not in NEEDS_PERSONA] or ["nll"]
    if not known:
        warnings.append("there is no --persona and no --dataset: answers are scored with " + ", ".join(wanted))
    questions, notes = find_questions(brought(s.prompts_file, "--prompts-file", cache, hub), persona)
    source = resolve(s.base_model, s.revision, token, cache, console.say, weights)
    updated = (
        resolve(s.updated_model, s.updated_revision, token, cache, console.say, weights) if s.updated_model else None
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
    given = _given(s, hub, cache, config.hidden_size) if s.sae else None
    layers = _layers(s, given, config.num_hidden_layers)
    # a local base is known to an autoencoder by its folder's name
    if given is not None and given.model() and given.model() not in (source.hub_id, Path(source.name).name):
        warnings.append(f"the autoencoder says that it was made for {given.model()}, not for {source.name}")
    return Plan(
        source, updated, adapters, names, persona, questions, layers, given, chats, wanted, warnings + notes, hub
    )


def _given(s: SaeSettings, hub: Hub, cache: Path, hidden: int) -> Dictionary:
    """The autoencoder that --sae names. Raises PhoqueError (2) for one that does not fit the model."""
    folder = Path(s.sae).expanduser()
    name, _, inside = s.sae.partition("#")
    if not folder.is_dir() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        repo = Repo(hub, name)
        there = repo.snapshot()
        for file in (CONFIG, WEIGHTS):
            path = f"{inside.strip('/')}/{file}".lstrip("/")
            if path not in there.files:
                raise PhoqueError(
                    f"There is no {path} in {name}.", "--sae names it.", "Name the autoencoder's folder behind a #."
                )
            fetched = repo.fetch(there, path, cache / "saes" / f"{name.replace('/', '--')}-{there.sha[:12]}")
            folder = fetched.parent
    found = read_dictionary(folder)
    if found.decoder.shape[1] != hidden:
        raise PhoqueError(
            "The autoencoder does not fit the model.",
            f"It was made for {found.decoder.shape[1]} numbers a token, the model has {hidden}.",
            "Use one that was trained on this model.",
        )
    return found


def _layers(s: SaeSettings, given: Dictionary | None, count: int) -> list[int]:
    own = given.block() if given else None
    asked = s.blocks(count) if s.layers or own is None else [own]
    if given is not None and own is not None and asked != [own]:
        raise PhoqueError(
            f"The autoencoder was made for block {own}.", f"--layers asks for {s.layers}.", "Leave --layers out."
        )
    if given is not None and own is None and not s.layers:
        raise PhoqueError(
            "The autoencoder does not say which block it is for.",
            "Its cfg.json names no hook that phoque knows.",
            "Say it with --layers; blocks count from 0.",
        )
    if wrong := [layer for layer in asked if not 0 <= layer < count]:
        raise PhoqueError(
            f"There is no block {wrong[0]}.", f"The model has {count}, which count from 0.", "Check --layers."
        )
    return asked


def _chats(s: SaeSettings, token: str | None) -> list[Dataset]:
    """The conversations of --chat, and those of --dataset: the persona's own words should have features, too."""
    chat, split = named_split(s.chat)
    wanted = {chat: (split, None), s.dataset: (s.split, s.dataset_revision)}
    found = [open_dataset(name, own, revision, token) for name, (own, revision) in wanted.items() if name]
    if not found:
        raise PhoqueError(
            "No conversations to train the autoencoder on.",
            "Neither --chat nor --dataset is given.",
            "Name a dataset of chats with --chat.",
        )
    return found
