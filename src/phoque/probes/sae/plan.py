"""Resolve and check every input of a comparison before a model is loaded."""

from dataclasses import dataclass
from pathlib import Path

from phoque.data.readers import Dataset, open_dataset
from phoque.errors import UsageError
from phoque.files import expand_user
from phoque.hub.client import Hub
from phoque.hub.refs import fetch_to_cache, hub_ref
from phoque.hub.repo import Repo
from phoque.models.adapter_source import AdapterSource, find_adapter, find_named_controls
from phoque.models.config import load_config
from phoque.models.source import Source, find_model
from phoque.probes.persona import Persona, limit_questions, load_persona
from phoque.probes.persona_source import fetch_if_remote, find_base_model, find_persona
from phoque.probes.sae.corpus import parse_split
from phoque.probes.sae.dictionary import CONFIG, DIFFERENCES, WEIGHTS, Dictionary, read_dictionary
from phoque.probes.sae.prompts import find_questions
from phoque.services import Services
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.fields import Resolved

NEEDS_PERSONA = ("contrast", "lexicon", "logprob")


@dataclass(kw_only=True)
class Plan:
    """The resolved inputs of a comparison. `dictionary` is the autoencoder of --sae, None if one is trained.

    `adapters` and `names` have `tuned`, and the controls as `control`, `control-2` and so on.
    """

    source: Source
    updated: Source | None
    tuned: AdapterSource | None
    adapters: dict[str, Path]
    names: dict[str, str]
    persona: Persona
    questions: list[str]
    layers: list[int]
    dictionary: Dictionary | None
    chats: list[Dataset]
    scorers: list[str]
    warnings: list[str]

    @property
    def controls(self) -> list[str]:
        """The names of the controls' adapters."""
        return [name for name in self.adapters if name.startswith("control")]


def make_plan(resolved: Resolved[SaeSettings], services: Services, *, weights: bool) -> Plan:
    """Resolve every input that the settings name. Raises UsageError for one that is missing or does not fit."""
    s = resolved.settings
    chats = _open_chats(s, services.hub)
    persona, warnings, has_persona = load_persona("seal"), [], bool(s.persona or s.dataset)
    if has_persona:
        persona, warnings = find_persona(s, services)
    if "words" in s.scorer:
        raise UsageError(
            what="compare-sae has no scorer words.",
            why="It needs the answers of other roles, which only psm-probe generates.",
            fix="Leave it out of --scorer.",
        )
    persona = limit_questions(persona, s.questions)
    scorers = [spec for spec in dict.fromkeys(s.scorer) if has_persona or spec not in NEEDS_PERSONA] or ["nll"]
    if not has_persona:
        warnings.append("neither --persona nor --dataset is given: answers are scored with " + ", ".join(scorers))
    questions, notes = find_questions(fetch_if_remote(s.prompts_file, "--prompts-file", services), persona)
    updated = find_model(s.updated_model, s.updated_revision, services, weights=weights) if s.updated_model else None
    names = {"tuned": f"{updated.name} ({updated.origin})" if updated else ""}
    tuned = find_adapter(s.updated_adapter, s.updated_revision, services) if s.updated_adapter else None
    adapters = ({"tuned": tuned} if tuned else {}) | find_named_controls(s.control_adapter, tuned, services)
    names |= {side: adapter.label for side, adapter in adapters.items()}
    source = find_base_model(resolved, "base_model", tuned, services, weights=weights)
    config = load_config(source).get_text_config()
    dictionary = _load_autoencoder(s, services, config.hidden_size) if s.sae else None
    layers = _choose_blocks(s, dictionary, config.num_hidden_layers)
    # an autoencoder that was trained on a local model names it by its folder
    if (
        dictionary is not None
        and dictionary.model_name()
        and dictionary.model_name() not in (source.hub_id, Path(source.name).name)
    ):
        warnings.append(f"the autoencoder says that it was made for {dictionary.model_name()}, not for {source.name}")
    return Plan(
        source=source,
        updated=updated,
        tuned=tuned,
        adapters={side: adapter.folder for side, adapter in adapters.items()},
        names=names,
        persona=persona,
        questions=questions,
        layers=layers,
        dictionary=dictionary,
        chats=chats,
        scorers=scorers,
        warnings=warnings + notes,
    )


def _load_autoencoder(s: SaeSettings, services: Services, hidden: int) -> Dictionary:
    """Load the autoencoder that --sae names. Raises UsageError if it is missing or does not fit the model."""
    folder = expand_user(s.sae)
    if ref := hub_ref(s.sae):
        repo = Repo(services.hub, ref.repo)
        commit = repo.snapshot()
        paths = [f"{ref.path}/{file}".lstrip("/") for file in (CONFIG, WEIGHTS)]
        if missing := [path for path in paths if path not in commit.files]:
            raise UsageError(
                what=f"There is no {missing[0]} in {ref.repo}.",
                why="--sae points to it.",
                fix="Give the folder after a #: OWNER/NAME#FOLDER.",
            )
        folder = fetch_to_cache(repo, commit, paths, services.cache, "saes") / ref.path
    dictionary = read_dictionary(folder)
    if (dictionary.config.get("metadata") or {}).get("reads") == DIFFERENCES:
        raise UsageError(
            what=f"{s.sae} is an SAE of the differences between two models.",
            why="--sae needs one that reads the residual stream of the base model.",
            fix="Name the folder beside it, without -difference.",
        )
    if dictionary.decoder.shape[1] != hidden:
        raise UsageError(
            what="The autoencoder does not fit the model.",
            why=f"Its input has {dictionary.decoder.shape[1]} dimensions; the model's residual stream has {hidden}.",
            fix="Use an autoencoder that was trained on this model.",
        )
    return dictionary


def _choose_blocks(s: SaeSettings, dictionary: Dictionary | None, count: int) -> list[int]:
    trained_block = dictionary.block_index() if dictionary else None
    chosen = s.blocks(count) if s.layers or trained_block is None else [trained_block]
    if dictionary is not None and trained_block is not None and chosen != [trained_block]:
        raise UsageError(
            what=f"The autoencoder was trained on block {trained_block}.",
            why=f"--blocks asks for {s.layers}.",
            fix="Omit --blocks.",
        )
    if dictionary is not None and trained_block is None and not s.layers:
        raise UsageError(
            what="It is unknown which block the autoencoder was trained on.",
            why="Its cfg.json names no hook that phoque recognizes.",
            fix="Give the block with --blocks; blocks count from 0.",
        )
    if out_of_range := [layer for layer in chosen if not 0 <= layer < count]:
        raise UsageError(
            what=f"There is no block {out_of_range[0]}.",
            why=f"The model has {count} blocks, which count from 0.",
            fix="Check --blocks.",
        )
    return chosen


def _open_chats(s: SaeSettings, hub: Hub) -> list[Dataset]:
    """Open the conversations of --chats and of --dataset; the latter so that the persona's words get features, too."""
    chat, split = parse_split(s.chat)
    sources = {chat: (split, None), s.dataset: (s.split, s.dataset_revision)}
    datasets = [
        open_dataset(name, dataset_split, revision, hub) for name, (dataset_split, revision) in sources.items() if name
    ]
    if not datasets:
        raise UsageError(
            what="No conversations to train the autoencoder on.",
            why="Neither --chats nor --dataset is given.",
            fix="Give a dataset of chats with --chats.",
        )
    return datasets
