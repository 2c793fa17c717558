"""Which persona a probe is about: a file, one on the Hub, or the prompts of the data that it was trained on."""

from itertools import islice
from pathlib import Path

from phoque.data.rows import BadRow, Row, open_dataset, parsed
from phoque.data.stream import SCANNED
from phoque.errors import PhoqueError
from phoque.hub.checkpoints import Repo
from phoque.hub.client import Hub
from phoque.probes.persona import Persona, from_rows, read_persona
from phoque.settings.psm import PsmSettings


def find_persona(s: PsmSettings, token: str | None, cache: Path, hub: Hub) -> tuple[Persona, list[str]]:
    """The persona, and what a user should know about it. Raises PhoqueError (2) if there is none."""
    if s.persona:
        owner, _, rest = s.persona.partition("/")
        name, _, path = rest.partition("/")
        if path and not Path(s.persona).expanduser().exists() and not s.persona.startswith((".", "/", "~")):
            repo = Repo(hub, f"{owner}/{name}", "dataset")
            there = repo.snapshot()
            if path not in there.files:
                raise PhoqueError(f"No {path} in {repo.name}.", "--persona names it.", "Check the name.")
            fetched = repo.fetch(there, path, cache / "personas" / f"{owner}--{name}-{there.sha[:12]}")
            return read_persona(str(fetched)), []
        return read_persona(s.persona), []
    if not s.dataset:
        raise PhoqueError(
            "No persona to look for.",
            "Neither --persona nor --dataset is given, so no prompt would ask for it.",
            "Write a persona file (see the README), or name the data that the adapter was trained on with --dataset.",
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
