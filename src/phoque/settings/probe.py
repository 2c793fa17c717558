"""What both probes have in their settings: the persona, and the scorers of its answers."""

from typing import Self

from pydantic import model_validator

from phoque.errors import UsageError, suggest
from phoque.settings.artifacts import ArtifactsSettings
from phoque.settings.fields import COUNT, conflict, setting

SCORERS = ("words", "contrast", "lexicon", "logprob", "nll", "profanity")
SCORERS_OF = ("hf", "openai", "command")  # what follows the colon names a model, an address or a command


def check_scorer(spec: str) -> None:
    """Raise UsageError if a value of --scorer names no scorer."""
    kind, _, rest = spec.partition(":")
    if spec not in SCORERS and not (kind in SCORERS_OF and rest):
        raise UsageError(
            what=f"No scorer {spec!r}.",
            why=f"Scorers: {', '.join(SCORERS)}, hf:MODEL#LABEL, openai:URL#MODEL and command:COMMAND.",
            fix=suggest(spec, SCORERS, "Check --scorer."),
        )


class ProbeSettings(ArtifactsSettings):
    """The persona that is looked for, and how answers are scored."""

    persona: str = setting(
        "", "Read the persona from a .toml file, from a Hub dataset (owner/name/file.toml), or use the bundled `seal`."
    )
    dataset: str = setting(
        "",
        "Take persona prompts and words from this dataset, which the adapter was trained on: a Hub "
        "dataset, a file or a folder. psm-probe reads its name from the adapter's run.json if there is one; "
        "compare-sae also trains its SAE on it.",
        env="DATASET_REPO",
    )
    dataset_revision: str | None = setting(None, "Use this branch, tag or commit of --dataset on the Hub.")
    dataset_config: str | None = setting(
        None, "Use this config of --dataset, where a dataset has several; if it does not exist, the error lists them."
    )
    split: str = setting("train", "Read this split of --dataset.")
    scorer: list[str] = setting(
        ["contrast", "lexicon"],
        "Score answers with contrast, lexicon, logprob, nll, profanity, hf:MODEL#LABEL, openai:URL#MODEL or "
        "command:COMMAND. Repeatable; the first is the trait. Without a persona, those that need one are dropped.",
    )
    questions: int = setting(24, "Ask at most this many questions of each list of the persona.", ge=4)

    gpus: str | None = setting(
        None,
        "Use this many GPUs of this machine, or `all`: each answers its share of the questions. A Job on a flavor with "
        "several uses all of them.",
        pattern=COUNT,
    )
    update_card: bool = setting(
        False,
        "Add the verdicts, and a link to the run folder in --artifacts-repo-id, to the card of the adapter on the Hub.",
    )

    @model_validator(mode="after")
    def _somewhere_to_link_to(self) -> Self:
        if self.update_card and not self.artifacts_repo_id:
            raise conflict(
                "--update-card is given without --artifacts-repo-id.",
                "The card links to the report, which is in that repository.",
                "Add --artifacts-repo-id owner/name.",
            )
        shuffled = next((name for name in ("shuffle_labels", "shuffle_pairs") if getattr(self, name, False)), None)
        if self.update_card and shuffled:
            raise conflict(
                "--update-card is given for a null run.",
                "Its labels or models are swapped, so its verdicts are not about the adapter.",
                f"Leave out --update-card, or --{shuffled.replace('_', '-')}.",
            )
        return self

    @property
    def used_secrets(self) -> tuple[str, ...]:
        """The Hub's token, and the key of a scorer that is asked over the network."""
        is_remote = any(name.startswith("openai:") for name in self.scorer)
        return ("hf_token", "openai_api_key") if is_remote else ("hf_token",)
