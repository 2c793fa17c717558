"""Which persona a probe is about: a file, one on the Hub, or the prompts of the data that it was trained on."""

from itertools import islice
from pathlib import Path

from phoque.data.rows import BadRow, Row, open_dataset, parsed
from phoque.data.scan import SCANNED
from phoque.errors import PhoqueError
from phoque.hub.client import Hub
from phoque.hub.repo import Repo
from phoque.probes.persona import Persona, from_rows, read_persona
from phoque.settings.compare_sae import SaeSettings
from phoque.settings.psm_probe import PsmSettings


def find_persona(s: PsmSettings | SaeSettings, token: str | None, cache: Path, hub: Hub) -> tuple[Persona, list[str]]:
    """The persona, and what a user should know about it. Raises PhoqueError (2) if there is none."""
    if s.persona:
        return read_persona(brought(s.persona, "--persona", cache, hub)), []
    if not s.dataset:
        raise PhoqueError(
            "No persona to look for.",
            "Neither --persona nor --dataset is given, so no prompt would ask for it.",
            "Write a persona file (see the README), or name the data of the adapter with --dataset (DATASET_REPO).",
        )
    dataset = open_dataset(s.dataset, s.split, s.dataset_revision, token)
    rows: list[Row] = []
    for record in islice(dataset.stream, SCANNED):
        try:
            rows.append(parsed(record))
        except BadRow:
            continue  # `phoque train` counts and names them
    persona = from_rows(read_persona("seal"), rows, dataset.name)
    note = f"prompts and words are those of {dataset.name}; the questions are the bundled ones"
    return persona, [note]


def brought(name: str, flag: str, cache: Path, hub: Hub) -> str:
    """The path of a file that may lie in a dataset on the Hub, as OWNER/NAME/FILE; anything else as it is."""
    owner, _, rest = name.partition("/")
    repository, _, path = rest.partition("/")
    if not path or Path(name).expanduser().exists() or name.startswith((".", "/", "~")):
        return name
    repo = Repo(hub, f"{owner}/{repository}", "dataset")
    there = repo.snapshot()
    if path not in there.files:
        raise PhoqueError(f"No {path} in {repo.name}.", f"{flag} names it.", "Check the name.")
    return str(repo.fetch(there, path, cache / "personas" / f"{owner}--{repository}-{there.sha[:12]}"))
