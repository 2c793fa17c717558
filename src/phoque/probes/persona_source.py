"""Find the persona of a probe: a local file, a file on the Hub, or the system prompts of the training data."""

from itertools import islice
from pathlib import Path

from phoque.data.rows import BadRow, Row, open_dataset, parse_row
from phoque.data.scan import MAX_SCANNED_ROWS
from phoque.errors import PhoqueError
from phoque.hub.client import Hub
from phoque.hub.repo import Repo
from phoque.probes.persona import Persona, load_persona, persona_from_rows
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.psm_probe import PsmSettings


def find_persona(s: PsmSettings | SaeSettings, token: str | None, cache: Path, hub: Hub) -> tuple[Persona, list[str]]:
    """Load the persona that the settings name; with notes for the user. Raises PhoqueError (2) if there is none."""
    if s.persona:
        return load_persona(fetch_if_remote(s.persona, "--persona", cache, hub)), []
    if not s.dataset:
        raise PhoqueError(
            "No persona is given.",
            "Neither --persona nor --dataset is set, so there is no prompt to ask the base model for it.",
            "Pass a persona file with --persona (see the README), or the adapter's training data with --dataset.",
        )
    dataset = open_dataset(s.dataset, s.split, s.dataset_revision, token)
    rows: list[Row] = []
    for record in islice(dataset.stream, MAX_SCANNED_ROWS):
        try:
            rows.append(parse_row(record))
        except BadRow:
            continue  # `phoque train` counts and reports bad rows
    persona = persona_from_rows(load_persona("seal"), rows, dataset.name)
    note = f"persona prompts and lexicon are from {dataset.name}; all other prompts and the questions are bundled ones"
    return persona, [note]


def fetch_if_remote(name: str, flag: str, cache: Path, hub: Hub) -> str:
    """The local path of a file, fetched if `name` is OWNER/NAME/FILE in a Hub dataset; any other name is unchanged."""
    owner, _, rest = name.partition("/")
    repository, _, path = rest.partition("/")
    if not path or Path(name).expanduser().exists() or name.startswith((".", "/", "~")):
        return name
    repo = Repo(hub, f"{owner}/{repository}", "dataset")
    hub_snapshot = repo.snapshot()
    if path not in hub_snapshot.files:
        raise PhoqueError(
            f"No {path} in {repo.name}.", f"{flag} names a file that this repository does not have.", f"Check {flag}."
        )
    return str(repo.fetch(hub_snapshot, path, cache / "personas" / f"{owner}--{repository}-{hub_snapshot.sha[:12]}"))
