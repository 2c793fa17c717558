"""Find the persona of a probe: a local file, a file on the Hub, or what the training data shows of it."""

from itertools import islice
from typing import Any

from phoque.console import shorten_list
from phoque.data.readers import Dataset, open_dataset
from phoque.data.rows import Row, parse_row
from phoque.data.scan import MAX_SCANNED_ROWS
from phoque.data.turns import BadRow
from phoque.errors import UsageError, first_line
from phoque.files import expand_user
from phoque.hub.refs import fetch_to_cache, hub_id, hub_ref
from phoque.hub.repo import Repo
from phoque.models.adapter_source import AdapterSource, find_base
from phoque.models.source import Source, find_model
from phoque.probes.persona import Persona, leave_out_questions, load_persona
from phoque.probes.proposed_persona import propose_persona
from phoque.services import Services
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.fields import Resolved, flag_names
from phoque.settings.psm_probe import PsmSettings

UNCHECKED = "the persona's questions could not be compared with what the adapter was trained on"


def find_persona(
    s: PsmSettings | SaeSettings, services: Services, record: dict[str, Any] | None = None
) -> tuple[Persona, list[str]]:
    """Load the persona that the settings name, or propose one from the data in `record`, the run.json of the adapter.

    Questions that the data asks are left out. Returns it with notes for the user. Raises UsageError if there is none.
    """
    given = load_persona(fetch_if_remote(s.persona, "--persona", services)) if s.persona else None
    name, split, revision, config = s.dataset, s.split, s.dataset_revision, s.dataset_config
    if not name and record is not None:
        recorded = {key: row.get("value") for key, row in record["settings"].items()}
        name, split = _readable_here(str(recorded.get("dataset") or "")), recorded.get("split") or split
        revision, config = recorded.get("dataset_revision"), recorded.get("dataset_config")
        if revision is None and hub_id(name):
            revision = record["data"].get("revision")  # the rows that the adapter was trained on
    if not name:
        if given is None:
            raise _no_persona_error()
        return given, [] if record is None else [f"{UNCHECKED}: its run.json names no data that can be read here"]
    try:
        dataset = open_dataset(name, split, revision, services.hub, config=config)
        rows = _read_rows(dataset)
    except Exception as error:  # whatever the Hub or a file raises: a given persona needs no data
        if not given or s.dataset:
            raise
        return given, [f"{UNCHECKED}: {first_line(error)}"]
    proposed = given or propose_persona(load_persona("seal"), rows, dataset.name)
    persona, shared = leave_out_questions(proposed, rows)
    name, notes = dataset.name, []
    if not given:
        notes.append(
            f"the persona's prompts and words are taken from {name}; all other prompts and the questions are bundled "
            "ones"
        )
    if shared:
        notes.append(f"{len(shared)} questions are left out, because {name} trains on them: {shorten_list(shared)}")
    return persona, notes


def _read_rows(dataset: Dataset) -> list[Row]:
    rows: list[Row] = []
    for raw in islice(dataset.stream, MAX_SCANNED_ROWS):
        try:
            rows.append(parse_row(raw))
        except BadRow:
            continue  # `phoque train` counts and reports bad rows
    return rows


def check_names_persona(resolved: Resolved[PsmSettings]) -> None:
    """Raise UsageError if nothing is named that a persona could come from, before the preset's model is looked for."""
    s = resolved.settings
    if not (s.persona or s.dataset or s.adapter_source or resolved.origins["model_source"].is_given):
        raise _no_persona_error()


def _no_persona_error() -> UsageError:
    return UsageError(
        what="No persona is given.",
        why="Neither --persona nor --dataset is set, and no adapter has a run.json that names data which can be read "
        "here.",
        fix="Pass --persona seal or a persona file, or the adapter's training data with --dataset.",
    )


def _readable_here(name: str) -> str:
    """A dataset's name, or "" for a path that this machine does not have."""
    return name if name == "seal" or hub_id(name) or expand_user(name).exists() else ""


def find_base_model(
    resolved: Resolved[Any], setting: str, adapter: AdapterSource | None, services: Services, *, weights: bool
) -> Source:
    """Find the base model: the one that is named, or else the one that the adapter was trained on, or the preset's.

    `setting` is the name of the setting for it. Raises UsageError if none is given.
    """
    name, revision = getattr(resolved.settings, setting), resolved.settings.revision
    if adapter is not None and not resolved.origins[setting].is_given:
        return find_base(adapter.folder, "", revision, services, weights=weights)
    if not name:
        flag = flag_names(type(resolved.settings), setting)[0]
        raise UsageError(what="No model is given.", why=f"{flag} is empty.", fix=f"Pass {flag}, or use a --preset.")
    return find_model(name, revision, services, weights=weights)


def show_settings(
    resolved: Resolved[Any], setting: str, source: Source, adapter: AdapterSource | None
) -> dict[str, dict[str, Any]]:
    """The settings with their origins; the base model is the one that `find_base_model` found, not the preset's."""
    rows = resolved.provenance()
    if adapter and not resolved.origins[setting].is_given:
        rows[setting] |= {"value": source.name, "source": "the adapter"}
    return rows


def fetch_if_remote(name: str, flag: str, services: Services) -> str:
    """The local path of a file, fetched if `name` is OWNER/NAME/FILE in a Hub dataset; any other name is unchanged."""
    ref = hub_ref(name)
    if ref is None or not ref.path:
        return name
    repo = Repo(services.hub, ref.repo, "dataset")
    snapshot = repo.snapshot()
    if ref.path not in snapshot.files:
        raise UsageError(
            what=f"No {ref.path} in {repo.name}.",
            why=f"{flag} names a file that this repository does not have.",
            fix=f"Check {flag}.",
        )
    return str(fetch_to_cache(repo, snapshot, [ref.path], services.cache, "personas") / ref.path)
